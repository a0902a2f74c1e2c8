"""OpenAI-compatible HTTP server for a model: `llama32 serve`."""
