"""Partitions: who holds which of the training examples; a file each, and what they share in `division`."""
