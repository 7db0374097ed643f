"""Data: sets by name as TFDS serves them, read without TensorFlow, and texts of the user's own."""
