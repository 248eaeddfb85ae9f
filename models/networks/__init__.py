"""Networks, a file each: a factory `(task, settings) -> torch.nn.Module`, with its settings beside it.

PyTorch is imported when a network is built: to list networks and check settings takes none of its seconds.
"""
