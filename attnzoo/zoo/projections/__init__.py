"""Exhibits that change how queries, keys, values and heads come about."""
