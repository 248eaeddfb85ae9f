"""What the last bits of a run depend on beside its settings: the processor, Python, PyTorch and NumPy.

`PYTHON machine.py` prints it as JSON.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VECTORS = ("sse", "ssse", "avx", "fma", "f16c", "amx", "asimd", "sve")  # the instructions that libraries choose by


def machine() -> dict[str, str]:
    """The processor's name, family, model and vector instructions, and the versions of what computes, by name."""
    told: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            told.setdefault(key.strip(), value.strip())
    flags = (told.get("flags") or told.get("Features") or "").split()
    return {
        "processor": told.get("model name") or platform.processor() or platform.machine(),
        "family": told.get("cpu family", ""),
        "model": told.get("model", ""),
        "vectors": " ".join(sorted(flag for flag in flags if flag.startswith(VECTORS))),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
    }


if __name__ == "__main__":
    print(json.dumps(machine()))
