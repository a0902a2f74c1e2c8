"""Quantized weights: plain layers that replace the linear layers of a model."""
