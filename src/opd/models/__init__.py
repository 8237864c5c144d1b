"""A transformers model and its tokenizer: found, built, rendered to ids, run to hidden states, its output layer."""
