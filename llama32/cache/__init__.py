"""The paged KV cache: packed batches, pages of keys and values, attention over pages."""
