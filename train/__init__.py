"""Sharded training: configuration, data, loop, checkpoints and the claims of the papers."""
