"""Flax (NNX) parts that exhibits share."""
