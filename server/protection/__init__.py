"""How the server collects updates: in the clear, as a sum of ciphertexts, or under masks that cancel."""
