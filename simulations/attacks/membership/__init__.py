"""Membership attacks: whether an example was trained on."""
