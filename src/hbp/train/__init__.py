"""How a plan is run: FSDP2, adaptive sequence parallelism, per-group checkpointing."""
