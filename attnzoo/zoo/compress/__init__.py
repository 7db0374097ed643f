"""Exhibits that turn trained models into others: smaller, sparser, merged, or remembering less."""
