"""Rows from any source become prompts: loaded, chosen and ordered."""
