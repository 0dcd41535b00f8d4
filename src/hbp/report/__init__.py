"""What was gained: one self-contained HTML page, and the same numbers as JSON."""
