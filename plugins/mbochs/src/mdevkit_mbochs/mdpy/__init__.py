"""mdpy: a framebuffer of a fixed size, and nothing else."""
