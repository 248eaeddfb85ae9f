"""Benchmarks: how fast FedVeil is, beside a bare loop, the machine's arithmetic, and other frameworks.

This folder lies beside the package and is not installed: run `python -m benchmarks` in a checkout.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # where other processes find this folder
