"""The state of one stage while it trains: optimiser, folder, checkpoints, evaluations, samples, display."""
