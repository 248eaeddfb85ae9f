"""A Flower server: the round loop, strategies and checkpoints."""
