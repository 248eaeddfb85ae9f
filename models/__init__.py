"""Networks, local training and evaluation; imports core only."""
