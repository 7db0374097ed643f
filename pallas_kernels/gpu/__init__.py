"""Attention kernels for Hopper GPUs, on Mosaic GPU. They compile here; none has run on a GPU yet (see `flash`)."""
