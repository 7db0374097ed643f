"""Attention kernels on Mosaic GPU: for Hopper (`flash`, `backward`) and, forward only, for Blackwell (`blackwell`)."""
