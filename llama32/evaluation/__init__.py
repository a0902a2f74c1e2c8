"""Model quality: perplexity, and an adapter for EleutherAI's lm-evaluation-harness."""
