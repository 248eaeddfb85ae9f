"""Trust between machines: certificates, identities, and the folders that hold keys."""
