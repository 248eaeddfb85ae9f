"""A server for clients on other machines: its gateway, its control interface, and its runs."""
