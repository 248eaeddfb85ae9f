"""Local training and evaluation: batches, losses, optimisers, schedules, augmentation, correction of gradients."""
