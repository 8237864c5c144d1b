"""Text written with a model: rollouts token by token, and answers to questions (`asked`)."""
