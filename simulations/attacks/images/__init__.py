"""Attacks on images: from the first layer, from low rank, by matching gradients."""
