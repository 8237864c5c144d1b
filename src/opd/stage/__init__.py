"""What one stage owns while it trains: the step's parts, its folder, checkpoints, evaluations and display."""
