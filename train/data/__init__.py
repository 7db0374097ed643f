"""Data sets as TFDS serves them, read without TensorFlow."""
