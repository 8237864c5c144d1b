"""Tables and pages about a finished run."""
