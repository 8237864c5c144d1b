"""Made-up data, rewards and toy models for the recipes of studies."""
