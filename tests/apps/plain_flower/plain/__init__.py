"""plain-flower: A Flower / PyTorch app."""
