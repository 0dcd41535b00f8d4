"""Samples: where they come from, how they become tokens, where the tokens are kept."""
