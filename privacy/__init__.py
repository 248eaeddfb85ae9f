"""What protects clients: fixed-point numbers, homomorphic encryption, secure aggregation, noise, keys. No Flower."""
