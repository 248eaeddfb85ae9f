"""A record that comes from a server that lies: `fedveil keys open` runs no code of it, and opens no model that was made up."""

from __future__ import annotations

import json
import re
import stat
import struct
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from helpers.experiments import digits
from helpers.protected import resealed
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from fedveil import run
from fedveil.cli import app
from fedveil.core.errors import FedveilError, ForgeryError, ProtectionError
from fedveil.privacy.homomorphic import lattice
from fedveil.privacy.homomorphic.keys import load_client
from fedveil.privacy.homomorphic.seal import read_context, write_field
from fedveil.privacy.trust.manifest import Manifest, now
from fedveil.simulations.holder import open_record

SMALL = {
    "data.clients": 3, "federation.cohort": 3, "federation.rounds": 2, "model.hidden": [8], "training.epochs": 1,
    "engine": "sequential",
}  # fmt: skip
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"
OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self, task, settings):
        super().__init__()
        self.out = torch.nn.Linear(64, 10)
        self.register_buffer("shift", torch.full((64,), 0.5))

    def forward(self, images):
        return self.out(images.flatten(1) - self.shift)
"""


@pytest.fixture(scope="module", params=["ckks", "bfv"])
def made(request, tmp_path_factory) -> Path:
    """The record of a run."""
    folder = tmp_path_factory.mktemp("records") / request.param
    run(digits(SMALL | {"privacy.protection": request.param}), out=folder, plots=False)
    return folder


@pytest.fixture
def record(made, tmp_path) -> Path:
    """What a server has of a run: no keys, and no model in the clear."""
    folder = tmp_path / "record"
    folder.mkdir()
    for name in ("experiment.toml", "model.sealed", "layout.safetensors"):
        (folder / name).write_bytes((made / name).read_bytes())
    return folder


def keys_of(made: Path) -> Path:
    return made / "keys" / "client-1"


def test_a_record_of_a_server_opens_with_the_key_alone(made, record, tmp_path) -> None:
    opened = open_record(record, keys_of(made), tmp_path / "model.safetensors")
    assert opened.read_bytes() == (made / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('dataset = "digits"', 'dataset = "evil:part"'),
        ('partition = "iid"', 'partition = "evil:part"'),
        ('name = "mlp"', 'name = "evil:part"'),
        ('strategy = "fedavg"', 'strategy = "evil:part"'),
        ('defence = "none"', 'defence = "evil:part"'),
        ("[evaluation]", '[evaluation]\nmetrics = ["evil:part"]'),
        ('name = "ckks"', 'name = "evil:part"'),
        ('name = "bfv"', 'name = "evil:part"'),
    ],
)
def test_code_that_a_record_names_is_not_run(old, new, made, record, tmp_path, monkeypatch) -> None:
    marker = tmp_path / "marker"
    for folder in (tmp_path, record):
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    settings = (record / "experiment.toml").read_text()
    if old not in settings:
        pytest.skip("the other protection's")
    (record / "experiment.toml").write_text(settings.replace(old, new))
    for unauthenticated in (False, True):
        try:
            open_record(record, keys_of(made), tmp_path / "out", unauthenticated=unauthenticated)
        except FedveilError:
            continue
    assert not marker.exists()
    assert "evil" not in sys.modules


def test_the_model_of_a_network_of_ones_own_opens_where_its_code_is_not(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_net.py").write_text(OWN)
    settings = {key: value for key, value in SMALL.items() if key != "model.hidden"}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        run(
            digits(settings | {"privacy.protection": "bfv", "model.name": "own_net:Net"}),
            out=tmp_path / "run",
            plots=False,
        )
    sys.modules.pop("own_net")
    (tmp_path / "own_net.py").unlink()
    opened = open_record(tmp_path / "run", tmp_path / "run" / "keys" / "client-1", tmp_path / "out")
    assert opened.read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert sorted(load_file(opened)) == ["out.bias", "out.weight", "shift"]


def test_a_secret_model_is_its_owners_alone(made, record, tmp_path) -> None:
    out = tmp_path / "model.safetensors"
    (tmp_path / f".{out.name}.part").touch(mode=0o644)  # of a process that was killed
    told = CliRunner().invoke(app, ["keys", "open", str(record), "--keys", str(keys_of(made)), "--out", str(out)])
    assert told.exit_code == 0, told.output
    open_record(record, keys_of(made), None)
    for path in (out, record / "model.safetensors", made / "model.safetensors", made / "best.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_model_that_was_changed_is_not_opened_and_the_key_not_used(made, record, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lattice._Compact, "decrypt", lambda *_: pytest.fail("the secret key was used"))
    sealed = record / "model.sealed"
    true = sealed.read_bytes()
    for place in (276, 20_000, len(true) - 1, len(true) - 28, len(true) - 3 * 28 - 1):
        changed = bytearray(true)
        changed[place] ^= 1
        sealed.write_bytes(resealed(bytes(changed)))
        with pytest.raises(ForgeryError):
            open_record(record, keys_of(made), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_shapes_that_the_server_made_up_are_refused(made, record, tmp_path) -> None:
    shapes = [("1.weight", [8, 64]), ("1.bias", [8]), ("3.bias", [10]), ("3.weight", [10, 8])]
    for wrong in (shapes, shapes[:3], []):
        save_file({}, record / "layout.safetensors", {"layout": json.dumps(wrong)})
        with pytest.raises(ProtectionError, match="with layout of tensors"):
            open_record(record, keys_of(made), tmp_path / "out")
    (record / "layout.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FedveilError, match=r"layout\.safetensors: cannot be read .* copy the whole record"):
        open_record(record, keys_of(made), tmp_path / "out")


def test_a_manifest_that_the_clients_of_the_model_did_not_sign_is_refused(made, record, tmp_path) -> None:
    toml = (record / "experiment.toml").read_text()
    manifest = Manifest.of("00" * 16, toml, "", {}, reproducible=False, created=now())
    kept = {"manifest": json.loads(manifest.content), "signatures": {}}
    (record / "manifest.json").write_text(json.dumps(kept))
    with pytest.raises(ForgeryError, match="is not the sum of the uploads that it names"):
        open_record(record, keys_of(made), tmp_path / "out")
    (record / "manifest.json").write_text(json.dumps(kept)[:-50])
    with pytest.raises(ProtectionError, match=r"manifest\.json: cannot be read .* copy the whole record"):
        open_record(record, keys_of(made), tmp_path / "out")


# --- records of FedVeil 0.1.0


OLD = struct.Struct("<4sHBBBBBxIQQQHhId16s16s16s32sIIIIIIQQQQ")


def as_before(blob: bytes) -> bytes:
    """A model.sealed as FedVeil 0.1.0 wrote it: format 1, a header of 196 bytes, no tags."""
    chunks, length = struct.unpack_from("<II", blob, 152)
    body = blob[276 : 276 + chunks * length]
    head = blob[:4] + struct.pack("<H", 1) + blob[6:11] + b"\0" + blob[12:184] + struct.pack("<Q", len(body))
    assert len(head) == OLD.size == 192
    return head + struct.pack("<I", crc32(body, crc32(head))) + body


def key_as_before(content: bytes) -> bytes:
    """A client.key without a key for authentication."""
    parts = read_context(content)
    added = write_field(1002, parts[1002][0])
    before, _, _ = content.partition(added)
    key_id = parts[1000][0]
    checksum = crc32(key_id, crc32(before)).to_bytes(4, "little")
    return before + write_field(1001, checksum) + write_field(1000, key_id)


@pytest.fixture
def old_keys(made, tmp_path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "client.key").touch(mode=0o600)
    (folder / "client.key").write_bytes(key_as_before((keys_of(made) / "client.key").read_bytes()))
    return folder


def test_a_record_of_0_1_0_opens_only_where_its_owner_says_so(made, record, old_keys, tmp_path) -> None:
    sealed, out = record / "model.sealed", tmp_path / "out"
    sealed.write_bytes(as_before(sealed.read_bytes()))
    (record / "layout.safetensors").unlink()
    said = r"was written by FedVeil 0\.1\.0, and nothing shows .*fedveil keys open --unauthenticated"
    for keys in (old_keys, keys_of(made)):
        with pytest.raises(ProtectionError, match=said):
            open_record(record, keys, out)
    command = ["keys", "open", str(record), "--keys", str(old_keys), "--out", str(out), "--unauthenticated"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    for name, value in load_file(made / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(out)[name], value)
    sealed.write_bytes(sealed.read_bytes()[:-1] + b"?")
    with pytest.raises(ProtectionError, match="whose checksum is wrong"):
        open_record(record, old_keys, out, unauthenticated=True)


def test_an_authenticated_record_does_not_open_without_its_check(made, record, old_keys, tmp_path) -> None:
    with pytest.raises(ProtectionError, match=r"is authenticated; open it without --unauthenticated"):
        open_record(record, keys_of(made), tmp_path / "out", unauthenticated=True)
    with pytest.raises(
        ProtectionError, match=r"client\.key: has no key for authentication: it was made by FedVeil 0\.1\.0"
    ):
        open_record(record, old_keys, tmp_path / "out")


def test_a_key_of_0_1_0_is_refused_with_what_to_do(old_keys) -> None:
    with pytest.raises(ProtectionError, match=re.escape("make new keys for everybody (fedveil keys new)")):
        load_client(old_keys / "client.key")
    assert load_client(old_keys / "client.key", old=True).mac == b""
