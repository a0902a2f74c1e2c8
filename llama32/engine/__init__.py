"""Many requests at once: continuous batching over the paged cache.

`request`, `pages`, `prefix` and `scheduler` decide and know no tensor; `rows` and `runner` compute
and know no queue; `engine` brings them together, and `asynchronous` puts it into a thread.
`speculation` lengthens steps by drafts, which come from `lookup` or a `draft` model.
"""
