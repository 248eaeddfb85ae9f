"""Run experiments with the FedVeil of the Python that runs this file, one after another, each in a process of its own.

`PYTHON execute.py < jobs.json`: a list of {name, folder, preset, text, settings}. Each run's record goes to FOLDER/run, what it
says to FOLDER/log; a line of JSON for each, {name, seconds, error}, goes to standard output as it ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

SAID = 2000  # characters of a log that an error repeats


def run_here(preset: str, text: str, settings: dict[str, Any], folder: Path) -> None:
    """Run an experiment in this process; the current folder is where its files are."""
    from fedveil import Experiment, run

    experiment = Experiment.parse(text) if text else Experiment.preset(preset)
    run(experiment.override(settings), out=folder, plots=False)


def _child(job: dict[str, Any]) -> int:
    """Run one job in this process, which ends with it; the exit code."""
    folder = Path(job["folder"])
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        run_here(job["preset"], job["text"], job["settings"], folder / "run")
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Run the jobs on standard input."""
    import fedveil

    jobs = json.load(sys.stdin)
    _ = fedveil.run, fedveil.Experiment  # imported once for all jobs, and what they import late
    for name in ("pandas", "sklearn.datasets"):
        import_module(name)
    for job in jobs:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = _child(job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        error = "" if code == 0 else f"exit code {code}: {(Path(job['folder']) / 'log').read_text()[-SAID:]}"
        told = {"name": job["name"], "seconds": round(time.monotonic() - started, 2), "error": error}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
