"""The manifest of a run on other machines: everything that its clients act on, signed by more than half of them.

The server sends each client its settings, and could send each client others. So it writes all of them into one manifest
first. Clients sign its SHA-256 with their registered keys, and go on only where more than half of all registered
clients signed the same. One client signs one manifest of a run. Two manifests of one run therefore never have enough
signatures both, whatever the server does, unless clients collude with it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.bundle import code
from fedveil.privacy.plan import plan_for
from fedveil.privacy.trust.identity import SIGNATURE, Registry, Signer, verify

UNSIGNED = bytes(32)  # the digest of a run that has no manifest: a simulation, or one without keys
LARGEST = 1 << 20  # bytes of a manifest, and of its signatures
VALID = timedelta(days=30)  # beside the time that its rounds may take
LONGEST = 1e9  # seconds that rounds may take in all, some 30 years: dates have an end
SKEW = timedelta(minutes=5)  # that clocks may disagree, as Flower's node authentication allows

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """Everything that the clients of a run act on.

    run: 16 bytes that name the run, in hexadecimal digits
    fedveil, code: the version, and the SHA-256 of its source
    clients: SHA-256 of the registry of all clients' keys
    cohort, least: the clients of a round, and the fewest in a sum; protection: its parameters; budget: its noise
    reproducible: training repeats from the seed
    vocabulary: SHA-256 of the words that come with the run; experiment: all settings as TOML
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    created: AwareDatetime
    expires: AwareDatetime
    fedveil: str
    code: Hash
    clients: Hash
    cohort: int
    least: int
    protection: str
    budget: str
    reproducible: bool
    vocabulary: Hash
    experiment: str

    @classmethod
    def of(
        cls, run: str, experiment: str, words: str, registry: Registry, *, reproducible: bool, created: datetime
    ) -> Manifest:
        """Make the manifest of a run; server and clients make the same from the same settings.

        experiment: TOML; words: the vocabulary that comes with the run, a line each
        Raise SettingsError where the settings cannot be read.
        """
        found = Experiment.received(experiment)
        privacy, federation = found.privacy, found.federation
        plan = plan_for(found).explain() if privacy.protected else "none"
        return cls(
            run=run,
            created=created,
            expires=created + VALID + timedelta(seconds=min(federation.rounds * federation.deadline, LONGEST)),
            fedveil=version("fedveil"),
            code=code(),
            clients=_hash(json.dumps([[client, registry[client].decode()] for client in sorted(registry)])),
            cohort=federation.cohort,
            least=privacy.least,
            protection=f"{privacy.protection.name}: {plan}",
            budget=(
                f"clip {privacy.clip}, noise multiplier {privacy.multiplier:g} at the {privacy.noise_at}, delta "
                f"{privacy.delta}, {federation.rounds} rounds"
                if privacy.noisy
                else "no noise"
            ),
            reproducible=reproducible,
            vocabulary=_hash(words),
            experiment=experiment,
        )

    @classmethod
    def read(cls, content: bytes) -> Manifest:
        """Read a manifest; raise ProtectionError where the bytes are none, or not as `content` writes it."""
        if len(content) > LARGEST:
            raise ProtectionError(f"a manifest of {len(content):,} bytes, and {LARGEST:,} are the most")
        with reading(lambda _: ProtectionError("what should be the run's manifest cannot be read")):
            self = cls(**json.loads(content))
        if self.content != content:
            raise ProtectionError("the run's manifest is not written as FedVeil writes it: it was edited")
        return self

    @property
    def content(self) -> bytes:
        """The bytes that are hashed, sent and archived: JSON, a line a field."""
        return json.dumps(self.model_dump(mode="json"), indent=1).encode() + b"\n"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, to which signatures, masks and MACs are bound."""
        return sha256(self.content).digest()

    @property
    def statement(self) -> bytes:
        """What a client signs."""
        return b"fedveil manifest\0" + self.digest

    def check_dates(self, now: datetime) -> None:
        """Raise ProtectionError where the manifest is not valid now."""
        if self.created > now + SKEW:
            raise ProtectionError(
                f"the run's manifest is of {_said(self.created)}, and here it is {_said(now)}: set the clocks of both machines (NTP)"
            )
        if now > self.expires:
            raise ProtectionError(
                f"the run's manifest expired on {_said(self.expires)}, and here it is {_said(now)}: start a new run, or set the "
                "clocks of both machines (NTP)"
            )


def majority(registry: Registry) -> int:
    """Return how many signatures a manifest needs: more than half of the registered clients."""
    return len(registry) // 2 + 1


def sign(manifest: Manifest, signer: Signer) -> bytes:
    """Return a client's signature of a manifest."""
    return signer.sign(manifest.statement)


def check_signature(manifest: Manifest, client: int, signature: bytes, registry: Registry) -> None:
    """Raise ProtectionError where a signature is not the client's, or not of this manifest."""
    if client not in registry:
        raise ProtectionError(f"client-{client + 1} signed the run's manifest, and is not registered")
    if len(signature) > SIGNATURE or not verify(registry[client], manifest.statement, signature):
        raise ProtectionError(
            f"client-{client + 1}'s signature is not of this manifest: the server showed it other settings, or forged it"
        )


def check_signatures(manifest: Manifest, signatures: Mapping[int, bytes], registry: Registry) -> None:
    """Raise ProtectionError where a manifest lacks valid signatures of more than half of the registered clients."""
    for client, signature in signatures.items():
        check_signature(manifest, client, signature, registry)
    if len(signatures) < majority(registry):
        raise ProtectionError(
            f"{len(signatures)} of {len(registry)} registered clients signed the run's manifest, and {majority(registry)} are "
            "needed: the server may have shown the others another one"
        )


def differences(found: Manifest, expected: Manifest) -> list[str]:
    """Name what a manifest says that is otherwise here, setting by setting."""
    lines = []
    if found.experiment != expected.experiment:
        there, here = _settings(found.experiment), _settings(expected.experiment)
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        lines = [f"{key} is {_short(there.get(key))} in the manifest and {_short(here.get(key))} here" for key in keys]
        lines = lines or ["the settings are written otherwise"]
    words = {
        "vocabulary": "the words that came with the run are others",
        "clients": "the registry of clients' keys is another (registry.json)",
        "code": "the server's FedVeil has other code",
    }
    for name in Manifest.model_fields:
        there, here = getattr(found, name), getattr(expected, name)
        if name != "experiment" and there != here:
            lines.append(words.get(name, f"{name} is {_short(there)} in the manifest and {_short(here)} here"))
    return lines


def write_signatures(signatures: Mapping[int, bytes]) -> bytes:
    """Write clients' signatures as JSON: hexadecimal digits by client."""
    return json.dumps({str(client): signatures[client].hex() for client in sorted(signatures)}).encode()


def read_signatures(content: bytes) -> dict[int, bytes]:
    """Read what `write_signatures` wrote; raise ProtectionError for anything else."""
    if len(content) > LARGEST:
        raise ProtectionError(f"signatures of {len(content):,} bytes, and {LARGEST:,} are the most")
    with reading(lambda _: ProtectionError("the signatures of the run's manifest cannot be read")):
        found = {int(client): bytes.fromhex(signature) for client, signature in json.loads(content).items()}
    if write_signatures(found) != content:
        raise ProtectionError("the signatures of the run's manifest are not written as FedVeil writes them")
    return found


def now() -> datetime:
    """Return the time, in whole seconds, UTC."""
    return datetime.now(UTC).replace(microsecond=0)


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _said(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _settings(text: str) -> dict[str, Any]:
    """Return all settings in TOML by their dotted keys."""
    with reading(lambda _: ProtectionError("the settings in the run's manifest cannot be read")):
        return dict(_leaves(tomllib.loads(text), ""))


def _leaves(tree: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
