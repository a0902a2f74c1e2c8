"""A loaded checkpoint: text in, text out."""
