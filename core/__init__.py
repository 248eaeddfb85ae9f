"""What every part of FedVeil shares; it imports nothing else of FedVeil."""
