"""How much one example changes a sum of updates, where clients take one step and the noise is added to their sum.

A client's update is the learning rate times the sum of its examples' clipped gradients, divided by training.batch_size, a
public number. So one example changes the sum of updates by rate C / batch size at most, and noise in it is that of DP-SGD as
if all data lay in one place (Abadi et al. 2016), a round a step.
"""

from __future__ import annotations

from fedveil.core.settings.sections import Privacy, Settings


def in_sums(privacy: Privacy) -> bool:
    """Say whether noise in the sum of updates hides single examples."""
    return privacy.per_example and privacy.noise_at != "client"


def change_of_sum(settings: Settings, learning_rate: float) -> float:
    """Return how much one example changes a sum of updates at most, L2, with this learning rate of a round."""
    size, clip = settings.training.batch_size, settings.privacy.clip
    assert isinstance(clip, float)  # a mechanism's check
    return learning_rate * clip / (1 if size == "full" else size)


def of_updates(settings: Settings) -> Privacy:
    """Return `[privacy]` with the bound of what noise in sums hides as `privacy.clip`, whether that is a client or an example.

    A learning rate that changes from round to round is refused with shares of noise, which are made for one bound.
    """
    privacy = settings.privacy
    if not in_sums(privacy):
        return privacy
    bound = change_of_sum(settings, settings.training.learning_rate)
    return privacy.model_copy(update={"unit": "client", "clip": bound})


def own_noise(privacy: Privacy) -> bool:
    """Say whether each client adds Gaussian noise that hides a part of its whole data by itself."""
    added = privacy.noise_at == "client" or (privacy.noise_at == "distributed" and privacy.distribution == "gaussian")
    return privacy.noisy and not privacy.per_example and added
