"""The attack lab: what an observer sees, the trials of an attack, its scores, and the matrix."""
