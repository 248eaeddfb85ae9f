"""Shared by all tests: where the real data is, and a clean environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

# `make test` draws the same examples each time, and no example has a deadline, so that it fails by a change alone and not
# by a busy machine; `make claims` draws fresh ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fresh", print_blob=True, deadline=None)
settings.load_profile(os.environ.get("FEDVEIL_EXAMPLES", "same"))

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "FEDVEIL_DATA" not in os.environ and BESIDE.is_dir():
    os.environ["FEDVEIL_DATA"] = str(BESIDE)


def pytest_make_parametrize_id(config, val, argname):
    """Bytes name no test: an archive holds the time it was made, and parallel workers must agree on every name."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="session")
def _no_ledger_in_the_users_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Clients that a test starts keep their ledgers in a folder of the tests, and in no user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; the test is skipped, and says so, where there is none."""
    folder = os.environ.get("FEDVEIL_DATA")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("needs the real data sets: set FEDVEIL_DATA to the folder that holds mnist/, sms/ and enron/")
    return Path(folder)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def superlink(tmp_path, request) -> Iterator[dict[str, str]]:
    """A SuperLink of this test's own, in simulation mode; gone at the end with all it started.

    With the parameter "installs" it lets uv install what an app requires, as Flower does, without a network.
    """
    installs = getattr(request, "param", "") == "installs"
    port, home = free_port(), tmp_path / "flower-home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ, "FLWR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": "/tmp", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "UV_OFFLINE": "1", "UV_CACHE_DIR": str(tmp_path / "uv"),
    }  # fmt: skip
    command = [
        "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1",
        "--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}",
        *([] if installs else ["--disable-runtime-dependency-installation"]),
    ]  # fmt: skip
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield environment
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
