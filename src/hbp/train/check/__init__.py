"""Does a model family train here as its documents alone do? Held against plain transformers in tiny size."""
