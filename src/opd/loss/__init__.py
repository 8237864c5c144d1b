"""From rollouts and scores to one batch, one loss and its gradient: the only reduction."""
