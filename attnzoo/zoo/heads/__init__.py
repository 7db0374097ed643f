"""Exhibits that decide which heads work, and how much each counts."""
