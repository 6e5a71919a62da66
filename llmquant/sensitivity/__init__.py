"""Which linears hurt: losses of schemes by linear, predicted from one pass, and mixed precision made of them."""
