"""Attacks on text: which words were trained on, and in which order."""
