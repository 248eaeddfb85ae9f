"""Shared ground of all other folders: settings, catalog, metrics, messages, records; it imports no other folder."""
