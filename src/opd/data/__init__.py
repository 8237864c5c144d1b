"""Rows from any source become prompts: loaded, selected and ordered; responses and scores go to files and back."""
