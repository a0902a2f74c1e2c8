"""Many requests at once: continuous batching over the paged cache.

`request`, `page_allocator`, `prefix_cache` and `scheduler` decide, without torch.
`batch_invariance` and `runner` compute. `engine` joins both sides, `delivery` hands out the tokens,
and `async_engine` runs an engine in a thread. `speculation` adds drafts to steps; `prompt_lookup`
and `draft_model` propose drafts.
"""
