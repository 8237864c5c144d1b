"""Measurements of models and responses; no model is changed."""
