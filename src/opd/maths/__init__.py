"""Tensors and numbers in, tensors and numbers out. Imports torch, numpy, and of this library errors and types alone."""
