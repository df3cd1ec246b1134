"""What the files of a Hugging Face checkpoint hold, read and checked without importing torch."""
