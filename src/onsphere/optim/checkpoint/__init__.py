"""State dicts: what is kept for every vector, saved and loaded."""
