"""Training and measuring of the studies' models."""
