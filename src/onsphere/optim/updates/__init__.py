"""What an optimizer does to each vector: its update, and the move along the sphere."""
