"""Exhibits that change who may see whom."""
