"""Exhibits that look into attention: what it can express, and what trained models do with it."""
