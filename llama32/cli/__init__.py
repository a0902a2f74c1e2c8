"""The `llama32` command line."""
