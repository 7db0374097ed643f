"""Fused attention kernels for TPU and GPU; imports nothing of attnzoo."""
