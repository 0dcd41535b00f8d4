"""A whole run, from data to report: the only place below the face that knows both halves."""
