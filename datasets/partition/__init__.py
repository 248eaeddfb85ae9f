"""Partitions of the training examples among the clients, one file for each; `division` has what they share."""
