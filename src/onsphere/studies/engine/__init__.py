"""Jobs, workers and records."""
