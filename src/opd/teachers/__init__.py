"""Scores of the student's tokens, by one teacher, a routed one, or one with another tokenizer."""
