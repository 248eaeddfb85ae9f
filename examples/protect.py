"""Protect: train without the server seeing any client's update, and compare the models.

The same two rounds three times: in the clear, with secure aggregation (the server sees the mean alone), and under
homomorphic encryption (the server sees ciphertexts alone). Protected weights are rounded to
a grid of about 1e-6; every round of training amplifies that, so longer runs agree in accuracy and not in each weight.
Run it anywhere: `python examples/protect.py`.
"""

from __future__ import annotations

import numpy as np

from fedveil import Experiment, run
from fedveil.models.parameters import get, to_numpy

digits = Experiment.preset("digits").override({"federation.rounds": 2})

plain: dict[str, np.ndarray] = {}
for protection in ("none", "secagg", "ckks"):
    result = run(digits.override({"privacy.protection": protection, "name": f"digits-{protection}"}), plots=False)
    weights = to_numpy(get(result.model))
    plain = plain or weights
    apart = max(abs(weights[name] - plain[name]).max() for name in plain)
    summary = result.summary
    print(
        f"{protection:<8} accuracy {summary['test_accuracy']:.3f}, {summary['bytes_up'] / 1e6:.1f} MB sent by clients, "
        f"largest difference from the plain model {apart:.1e}"
    )
