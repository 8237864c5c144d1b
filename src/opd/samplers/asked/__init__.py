"""Questions to LLM judges and their answers: a server, a model of this process, a program. See `protocol.py`."""
