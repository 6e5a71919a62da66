"""How much a checkpoint still knows: perplexity, and divergence from the original."""
