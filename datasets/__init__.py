"""What is learned from: finding, checking, tokenising and partitioning data. It imports core only."""
