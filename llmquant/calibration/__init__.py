"""Text in, token batches out, and the activations that they cause, layer after layer."""
