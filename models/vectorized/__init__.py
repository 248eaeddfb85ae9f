"""Local training of many clients at once: a rule for each kind of layer, and `torch.func` for other networks."""
