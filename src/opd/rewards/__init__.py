"""The value of a response: functions of a text, and LLM judges."""
