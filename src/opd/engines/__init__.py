"""Servers of models: one HTTP client, replicas with bounded load, and the protocol of vLLM."""
