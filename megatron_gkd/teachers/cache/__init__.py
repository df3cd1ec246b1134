"""A teacher's top-k on disk: written by `score`, read in place of the model."""
