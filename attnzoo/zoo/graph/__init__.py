"""Exhibits whose attention follows a graph of what belongs together."""
