"""Hugging Face directories on disk: read with suspicion, written so that a crash cannot leave a half file."""
