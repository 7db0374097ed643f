"""Exhibits that change how scores become weights."""
