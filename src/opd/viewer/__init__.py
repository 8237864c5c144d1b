"""A run's folder for a reader: an HTML page, as a file or alive, two runs compared, a screen in a terminal."""
