"""Rollouts and scores become one batch, one loss and its gradient: the only reduction."""
