"""A packed checkpoint in use: as a transformers model, and from prompt to text."""
