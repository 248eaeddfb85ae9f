"""Differential privacy: clipping, noise, and what both together guarantee."""
