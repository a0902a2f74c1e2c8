"""Speed on this machine, beside transformers and llama.cpp: `llama32 bench`."""
