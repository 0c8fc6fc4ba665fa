"""Another model's opinion of the responses of an evaluation, asked for over HTTP. Needs neither ranks nor torch."""
