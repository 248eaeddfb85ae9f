"""Homomorphic encryption: sums of ciphertexts under CKKS and BFV, their keys and their bytes."""
