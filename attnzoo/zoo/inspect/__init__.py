"""Exhibits that measure what attention and its weights do."""
