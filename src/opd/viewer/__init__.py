"""A run's folder for a reader: one HTML page, two runs compared."""
