"""One file or folder a command. Nothing below imports this room."""
