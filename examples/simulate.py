"""Simulate: how much does it cost that clients hold different classes?

Ten clients train on real handwritten digits (8x8, inside scikit-learn; no download), once with every class at every
client, once with two classes at each. Run it anywhere: `python examples/simulate.py`.
"""

from __future__ import annotations

from fedveil import Experiment, run

digits = Experiment.preset("digits")

for partition in ("iid", "classes"):
    result = run(digits.override({"data.partition": partition, "name": f"digits-{partition}"}))
    curve = result.metrics.test_accuracy
    print(f"{partition:<8} accuracy {curve.iloc[-1]:.3f} after {result.summary['rounds']} rounds, in {result.run_dir}")
