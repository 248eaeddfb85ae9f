"""What may be seen: numbers on a grid, homomorphic encryption, secure aggregation, and keys. Knows no Flower."""
