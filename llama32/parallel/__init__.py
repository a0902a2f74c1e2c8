"""A model on several processes: tensor parallelism and sharded training (FSDP)."""
