"""Sequence parallelism: process groups per degree, document attention, all-to-all."""
