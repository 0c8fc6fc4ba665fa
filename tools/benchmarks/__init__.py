"""One module for each thing that `tools.benchmark` measures."""
