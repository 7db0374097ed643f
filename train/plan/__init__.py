"""`attnzoo plan`: the training step compiled for a pod that is not there, and what the compiled program says of it."""
