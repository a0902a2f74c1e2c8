"""An OpenAI-compatible server over one model: `llama32 serve`."""
