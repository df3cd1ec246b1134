"""The quickstart: train a small teacher and smaller students, and compare them."""
