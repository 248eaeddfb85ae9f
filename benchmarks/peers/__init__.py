"""The same jobs on other frameworks: scripts that run in separate environments."""
