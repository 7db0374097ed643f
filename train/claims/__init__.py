"""One small experiment per paper: its central claim on this library."""
