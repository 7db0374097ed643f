"""Exhibits that turn trained models into smaller, sparser or merged ones."""
