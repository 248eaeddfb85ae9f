"""Many clients trained at once: a rule for each kind of layer, and `torch.func` for layers without one."""
