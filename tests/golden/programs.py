"""Runs that need programs of their own: the command line, a kill, Flower's SuperLink, a server and its clients, an attack."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from golden.runs import Run

WAIT = 600.0  # seconds that anything may take on a machine that has other work
SAID = 2000  # characters of an output that an error repeats
CLIENTS = 3  # of a deployed run
TRIALS = 2  # of an attack
KILLED_AT = 4  # lines of metrics.csv
HOST = "127.0.0.1"
Word = str | Path


class Failed(Exception):
    """A program did not do what it should."""


def command(run: Run, python: Path, folder: Path) -> None:
    """Run an experiment by `fedveil run`."""
    _call(_run_words(run, python), python, folder)


def killed(run: Run, python: Path, folder: Path) -> None:
    """Run an experiment by `fedveil run`, end it by SIGKILL in mid-run, and resume it."""
    metrics = folder / "run" / "metrics.csv"

    def under_way() -> bool:
        return process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= KILLED_AT)

    with _started(_run_words(run, python), python, folder, "killed.log") as process:
        _until(under_way, "its first rounds are done", pause=0.002)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise Failed(f"it ended before it could be killed: {_said(folder / 'killed.log')}")
        kept = metrics.read_text().count("\n")
    _call(_fedveil(python, "run", "--resume", "run", "--quiet"), python, folder)
    if metrics.read_text().count("\n") <= kept:
        raise Failed(f"it had done its {kept} rounds before it was killed")


def flower(run: Run, python: Path, folder: Path) -> None:
    """Run an experiment by `flwr run`, on a SuperLink of its own in simulation."""
    config, protection = {"experiment": run.text}, _protection(run)
    if protection != "none":
        _call(_fedveil(python, "keys", "new", "keys", "--set", f"privacy.protection={protection}"), python, folder)
        config["keys"] = str(folder / "keys")
    settings, home, port = folder / "run.toml", folder / "flower", _free_port()
    settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "golden"\n[superlink.golden]\naddress = "{HOST}:{port}"\ninsecure = true\n'
    )
    words = [
        "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", HOST,
        "--port", str(port), "--control-api-address", f"{HOST}:{_free_port()}", "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with _started(words, python, folder, "superlink.log") as process:
        _until(lambda: process.poll() is not None or _answers(port), "the SuperLink answers")
        said = _call(["flwr", "run", _checkout(python), "--stream", "--run-config", settings], python, folder)
    records = [path for path in folder.glob("runs/*") if (path / "metrics.csv").exists()]
    if len(records) != 1:
        raise Failed(f"{len(records)} records: {said[-SAID:]}\n{_said(folder / 'superlink.log')}")
    records[0].rename(folder / "run")
    if not (folder / "run" / "model.safetensors").exists():
        _call(_fedveil(python, "keys", "open", "run", "--keys", "keys"), python, folder)


def deployed(run: Run, python: Path, folder: Path) -> None:
    """Run an experiment on a server and clients of its own on loopback, each client with its part of the digits."""
    protection, port, control = _protection(run), _free_port(), _free_port()
    server: list[Word] = ["--insecure"]
    clients: list[list[Word]] = [["--insecure"]] * CLIENTS
    if protection != "none":
        words = ("--host", HOST, "--clients", str(CLIENTS), "--set", f"privacy.protection={protection}")
        _call(_fedveil(python, "keys", "new", "keys", *words), python, folder)
        server, clients = ["--keys", "keys/server"], [["--keys", f"keys/client-{n + 1}"] for n in range(CLIENTS)]
    (folder / "deployed.toml").write_text(run.text)
    with ExitStack() as stack:

        def start(name: str, *words: Word) -> None:
            stack.enter_context(_started(_fedveil(python, *words), python, folder, f"{name}.log"))

        where = ("--host", HOST, "--port", str(port), "--control", str(control))
        start("server", "server", *server, *where, "--state", "state")
        _until(lambda: _answers(control) and _answers(port), "the server answers", log=folder / "server.log")
        for n, trust in enumerate(clients, 1):
            data = ("--data", f"digits:{n}/{CLIENTS}", "--state", f"client-{n}")
            start(f"client-{n}", "client", "--server", f"{HOST}:{port}", *trust, *data)

        def connected() -> bool:
            told = json.loads(_call(_fedveil(python, "status", "--on", on, "--json"), python, folder))
            return [one["connected"] for one in told["clients"]].count(True) == CLIENTS

        on = f"localhost:{control}"
        _until(connected, "all clients are connected", pause=0.5, log=folder / "server.log")
        _call(_fedveil(python, "run", "deployed.toml", "--on", on, "--quiet"), python, folder)
    (record,) = (folder / "state" / "runs").iterdir()
    record.rename(folder / "run")
    if not (folder / "run" / "model.safetensors").exists():
        _call(_fedveil(python, "keys", "open", "run", "--keys", "keys/client-1"), python, folder)


def attack(run: Run, python: Path, folder: Path) -> None:
    """Attack the clients of an experiment, or a captured run of it; its score, and that of guessing, in run/scores.csv."""
    words = [run.attack, "--trials", str(TRIALS), "--json", "--quiet", "--out", "report"]
    if run.captured:
        _call(_run_words(run, python), python, folder)
        words += ["--against", "run"]
    else:
        (folder / "run").mkdir()
        words += [run.preset, *_changes(run)]
    told = json.loads(_call(_fedveil(python, "attack", *words), python, folder))
    names = [told["metric"], "baseline"]
    (folder / "run" / "scores.csv").write_text(f"{','.join(names)}\n{','.join(repr(told[name]) for name in names)}\n")


PROGRAMS: dict[str, Callable[[Run, Path, Path], None]] = {
    "command": command,
    "killed": killed,
    "flower": flower,
    "deployed": deployed,
    "attack": attack,
}


def execute(run: Run, python: Path, folder: Path) -> tuple[float, str]:
    """Run an experiment in its way, the record in `folder`/run; seconds, and why it failed or empty."""
    started, error = time.monotonic(), ""
    try:
        _check_programs(python)
        PROGRAMS[run.way](run, python, folder)
    except (Failed, OSError, subprocess.SubprocessError) as failure:
        error = str(failure)
    return time.monotonic() - started, error


# --- programs


def _fedveil(python: Path, *words: Word) -> list[Word]:
    return [python, "-m", "fedveil", *words]


def _run_words(run: Run, python: Path) -> list[Word]:
    """`fedveil run` of an experiment with a preset."""
    return _fedveil(python, "run", run.preset, *_changes(run), "--out", "run", "--quiet")


def _changes(run: Run) -> list[str]:
    """Its settings, as a command line has them."""
    changes = [f"{key}={'' if value is None else json.dumps(value)}" for key, value in run.settings.items()]
    return [word for change in changes for word in ("--set", change)]


def _environment(python: Path, folder: Path) -> dict[str, str]:
    """Programs of this Python come first, and Flower keeps its files in the run's folder."""
    own = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(folder / "flower")}
    return {**os.environ, **own, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_TMPDIR": "/tmp"}


def _check_programs(python: Path) -> None:
    """Raise Failed where Flower's programs beside this Python start another one, as in a copied environment."""
    first = (python.parent / "flower-superlink").read_text().partition("\n")[0].removeprefix("#!")
    if Path(first).parent != python.parent:
        raise Failed(
            f"{python.parent / 'flower-superlink'} starts {first}: make this environment anew, do not copy one"
        )


def _call(words: Sequence[Word], python: Path, folder: Path) -> str:
    """What a program prints; raise Failed where it fails."""
    answer = subprocess.run(
        words, cwd=folder, env=_environment(python, folder), capture_output=True, text=True, timeout=WAIT, check=False
    )
    if answer.returncode:
        said = (answer.stdout + answer.stderr)[-SAID:]
        raise Failed(f"{' '.join(map(str, words))}: exit code {answer.returncode}: {said}")
    return answer.stdout


@contextmanager
def _started(words: Sequence[Word], python: Path, folder: Path, log: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until it is asked to end, with all that it started."""
    with (folder / log).open("wb") as file:
        process = subprocess.Popen(
            words, cwd=folder, env=_environment(python, folder), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)


def _until(holds: Callable[[], bool], what: str, *, pause: float = 0.05, log: Path | None = None) -> None:
    """Wait until something holds; raise Failed where it does not in time."""
    deadline = time.monotonic() + WAIT
    while not holds():
        if time.monotonic() > deadline:
            raise Failed(f"not within {WAIT:g} s: {what}\n{_said(log) if log else ''}")
        time.sleep(pause)


def _said(log: Path) -> str:
    return log.read_text("utf-8", errors="replace")[-SAID:]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def _protection(run: Run) -> str:
    return str(tomllib.loads(run.text).get("privacy", {}).get("protection", "none"))


def _checkout(python: Path) -> Path:
    """The folder that FedVeil was installed from, which `flwr run` takes its app's settings of."""
    # isolated: the current folder may be another checkout
    find = "from importlib.metadata import distribution as d; print(d('fedveil').read_text('direct_url.json'))"
    answer = subprocess.run([python, "-I", "-c", find], capture_output=True, text=True, check=True)
    return Path(json.loads(answer.stdout)["url"].removeprefix("file://"))
