"""Hierarchical Balance Packing: plan and train mixed-length fine-tuning whose ranks finish together."""

__version__ = "0.1.0"
