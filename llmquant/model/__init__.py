"""What is known about architectures: structure, and one layer in memory at a time."""
