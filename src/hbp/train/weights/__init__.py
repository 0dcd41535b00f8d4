"""Checkpoints: their files, which of their tensors a model is made of, and how a sharded model gets its values."""
