"""What travels: Flower's records as FedVeil uses them, how they are framed, and how weights are written."""
