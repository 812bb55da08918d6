"""Parameters that are spread over processes: where they lie, and steps that add up sums."""
