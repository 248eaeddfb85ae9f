"""The experiments that ship with FedVeil, a TOML file each."""
