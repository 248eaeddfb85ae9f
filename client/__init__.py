"""A Flower client: receive, train, reply."""
