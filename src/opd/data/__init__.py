"""Rows from any source become prompts: loaded, selected and ordered."""
