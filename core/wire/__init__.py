"""Messages on the wire: Flower's records as FedVeil uses them, their framing, and the encodings of weights."""
