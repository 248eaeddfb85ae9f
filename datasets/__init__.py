"""Data sets: finding, checking, tokenising and partitioning data; imports core only."""
