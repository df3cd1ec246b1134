"""The experiment with images: models that learn to read drawn digits."""
