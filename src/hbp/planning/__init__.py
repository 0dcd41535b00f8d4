"""How a plan is made: lengths in, packs and steps out. Knows no torch."""
