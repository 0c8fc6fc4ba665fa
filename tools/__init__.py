"""Commands around the framework: the demo, reports, model surgery."""
