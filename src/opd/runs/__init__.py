"""A recipe becomes stages: prepared, checked, built, trained, exported."""
