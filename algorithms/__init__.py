"""Federated learning algorithms, one file for each paper: the server's aggregation, and settings of local training."""
