"""Attack: read words out of one client's update, with and without protection.

The victims' text messages are made up (spam-demo; no download). In the clear, the rows of the embedding that moved are
the words of the messages, and pruning the update does not hide them; under secure aggregation the server sees no
client's own update, and guesses.
Run it anywhere: `python examples/attack.py`.
"""

from __future__ import annotations

from fedveil import Experiment
from fedveil.simulations import attacks

messages = Experiment.preset("spam-demo")

for name, settings in {
    "in the clear": {},
    "pruned": {"privacy.defence": "prune"},
    "secure aggregation": {"privacy.protection": "secagg"},
}.items():
    outcome = attacks.run("words", messages.override(settings), trials=20)
    found, guessed = outcome.mean(), outcome.mean(baseline=True)
    print(f"{name:<18} {outcome.metric} {found[outcome.metric]:.3f}, guessing {guessed[outcome.metric]:.3f}")
    if outcome.refused:
        print(f"  {outcome.refused}")
