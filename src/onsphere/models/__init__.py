"""Models as a user names them: factories, checkpoints, models of the transformers library."""
