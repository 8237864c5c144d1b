"""LLM judges: a server, a model of this process or a program answers questions. See `protocol.py`."""
