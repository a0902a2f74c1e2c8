"""Interpretability: capture and edit the tensors inside a forward pass."""
