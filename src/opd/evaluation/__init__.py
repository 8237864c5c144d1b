"""Measurements of models and responses. Nothing here changes a model."""
