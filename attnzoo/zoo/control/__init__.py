"""Exhibits that steer what a trained model does by its attention."""
