"""Exhibits that change how positions enter attention."""
