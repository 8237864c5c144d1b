"""Transformers models and tokenizers: loading, rendering to ids, forward passes, the output layer."""
