"""Attention kernels for Hopper GPUs, on Mosaic GPU: simulated and compiled, not yet run on a GPU (see `flash`)."""
