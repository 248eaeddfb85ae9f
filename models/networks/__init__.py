"""Networks, one file for each: a factory `(task, settings) -> torch.nn.Module`, with its settings.

PyTorch is imported only when a network is built, so that listing networks and checking settings stay fast.
"""
