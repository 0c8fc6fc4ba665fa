"""Where people watch a run beside the console: wandb and TensorBoard, told the same by the same names."""
