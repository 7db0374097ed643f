"""Exhibits that turn a trained model into a smaller one, or one that remembers less."""
