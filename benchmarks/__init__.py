"""Measured claims: how fast FedVeil is, beside a bare loop, the machine's arithmetic, and other frameworks."""
