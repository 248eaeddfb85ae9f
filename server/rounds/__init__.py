"""One round, and the loop of rounds: cohort, replies, next model, observers."""
