"""Text to token ids and back: tokenizers, chat formats, tool calls, grammars, stop strings."""
