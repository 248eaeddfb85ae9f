"""The same jobs on other frameworks, each a script that needs nothing of FedVeil and runs in an environment of its own."""
