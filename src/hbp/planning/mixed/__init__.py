"""Our own method: packs that are alike, micro-steps that mix degrees, steps that hold the mix of the data."""
