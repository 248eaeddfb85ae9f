"""What docs/results.md claims, as data, and the script that measures it: `make claims`."""
