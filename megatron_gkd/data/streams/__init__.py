"""Rows that are read and tokenized while training, in place of before it."""
