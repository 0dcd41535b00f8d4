"""A plan inside the trainers that people already use, and as packed data that they read."""
