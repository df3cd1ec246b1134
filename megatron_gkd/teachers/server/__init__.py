"""A teacher behind vLLM servers."""
