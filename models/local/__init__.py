"""Local training and evaluation: batches, losses, optimisers, schedules, augmentation, the correction of gradients."""
