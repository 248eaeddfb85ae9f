"""Attacks on privacy: what an observer learns from what really travels, as numbers beside what guessing gives."""
