"""Small complete networks with a slot for the attention mechanism."""
