"""How fast: products and generated text beside their peers, in one run and in turn."""
