"""Products with packed weights: a definition in plain torch, and native code that is tested against it."""
