"""YAML in, a validated frozen recipe out, with an explanation of every mistake; no torch."""
