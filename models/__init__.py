"""What is trained: networks, and the one way to train and evaluate them. It imports core only."""
