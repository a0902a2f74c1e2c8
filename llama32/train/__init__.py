"""Training: from examples to microbatches, the loop over them, and fine-tuning as a whole."""
