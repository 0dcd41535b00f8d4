"""Orders other than the fastest: what an optimizer step holds comes first, how it is packed second."""
