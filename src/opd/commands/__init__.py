"""One file or folder a command; nothing in the library imports it."""
