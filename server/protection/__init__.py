"""How the server takes updates: in the clear, as a sum of ciphertexts, or under masks that cancel."""
