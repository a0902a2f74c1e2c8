"""Training: examples, micro-batches, the training loop, fine-tuning."""
