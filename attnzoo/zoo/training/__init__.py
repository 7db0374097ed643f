"""Exhibits that change how attention is trained."""
