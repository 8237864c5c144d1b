"""Conversations of the student with tools and games: a turn of the student, an observation, the next turn."""
