"""The report: what runs and evaluations have left on disk → one HTML page, and figures for papers."""
