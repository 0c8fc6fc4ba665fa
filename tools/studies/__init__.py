"""Measured comparisons of objectives: chains of the commands a user would type. RESULTS.md says what came of them."""
