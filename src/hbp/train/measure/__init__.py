"""Measuring what training costs, on the engine that trains."""
