"""Tables of a finished run."""
