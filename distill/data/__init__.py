"""Records on disk, batches in memory, and the order in which they come."""
