"""Made-up data, rewards and toys that recipes of studies name."""
