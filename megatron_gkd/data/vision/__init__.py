"""Images in rows: which images a sample has, and what a model's processor makes of them."""
