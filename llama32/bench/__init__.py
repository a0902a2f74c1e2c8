"""How fast it is here, beside others: `llama32 bench`."""
