"""Exhibits that align one sequence with another: which source positions a target position reads."""
