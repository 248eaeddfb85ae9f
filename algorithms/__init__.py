"""A file a paper: what a client does around local training, and what the server makes of its update."""
