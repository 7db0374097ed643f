"""The exhibits: one paper, one file, grouped by family."""
