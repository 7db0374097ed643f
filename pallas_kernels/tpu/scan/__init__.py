"""Chunked linear recurrences: one chunk algebra for gated linear attention, delta rules and diagonal plus rank one."""
