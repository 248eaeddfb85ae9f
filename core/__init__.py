"""The base of all other folders: settings, catalog, metrics, messages, records; it imports none of them."""
