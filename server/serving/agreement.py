"""The manifest of a deployed run as its server collects signatures of it, before clients tell anything of their data."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedveil.core.errors import DeploymentError, ProtectionError
from fedveil.core.foreign import reading
from fedveil.core.record.record import write_atomically
from fedveil.core.wire.messages import CONFIG, MANIFEST, SIGNATURES
from fedveil.privacy.trust.identity import Registry
from fedveil.privacy.trust.manifest import (
    UNSIGNED,
    Manifest,
    check_signature,
    differences,
    majority,
    write_signatures,
)

FILE = "manifest.json"  # in the record: the manifest, and who signed it


class Agreement:
    """The manifest of a run, and the signatures of it so far, by client."""

    def __init__(self, manifest: Manifest, registry: Registry) -> None:
        self.manifest, self.signatures = manifest, dict[int, bytes]()
        self._registry = registry
        self._file: Path | None = None

    @property
    def settled(self) -> bool:
        """Whether more than half of the registered clients have signed."""
        return len(self.signatures) >= majority(self._registry)

    def __str__(self) -> str:
        signed, needed = len(self.signatures), majority(self._registry)
        return (
            f"{signed} of {len(self._registry)} registered clients signed the run's manifest, and {needed} are needed"
        )

    def question(self, node: int) -> Message:
        """Return the message that asks a node for its client's signature."""
        content = RecordDict({CONFIG: ConfigRecord({MANIFEST: self.manifest.content})})
        return Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.{MANIFEST}")

    def take(self, client: int, reply: Message) -> None:
        """Take a client's signature; raise ProtectionError where its reply holds none of this manifest."""
        record = reply.content.get(CONFIG)
        signature = record.get(SIGNATURES) if isinstance(record, ConfigRecord) else None
        if not isinstance(signature, bytes):
            raise ProtectionError("its answer holds no signature of the run's manifest")
        check_signature(self.manifest, client, signature, self._registry)
        self.signatures[client] = signature
        self._write()

    def greeting(self) -> ConfigRecord:
        """Return the settings of a greeting, by which a client sees what the others signed."""
        return ConfigRecord({MANIFEST: self.manifest.content, SIGNATURES: write_signatures(self.signatures)})

    def keep(self, record: Path) -> None:
        """Write the manifest and its signatures into the run's record, now and whenever another client signs."""
        self._file = record / FILE
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            signatures = json.loads(write_signatures(self.signatures))
            kept = {"manifest": json.loads(self.manifest.content), "signatures": signatures}
            write_atomically(self._file, json.dumps(kept, indent=1).encode() + b"\n")

    @classmethod
    def resume(cls, record: Path, expected: Manifest, registry: Registry) -> Agreement | None:
        """Return the agreement in a record; None where it has none.

        expected: the manifest that this server would make now
        Raise DeploymentError where the run began with another: clients sign one manifest of a run.
        """
        path = record / FILE
        if not path.exists():
            return None
        with reading(lambda why: DeploymentError(f"{path}: is damaged ({why}); put it back, or start a new run")):
            kept = json.loads(path.read_bytes())
            manifest = Manifest(**kept["manifest"])
            signatures = {int(client): bytes.fromhex(one) for client, one in kept["signatures"].items()}
        expected = expected.model_copy(
            update={"run": manifest.run, "created": manifest.created, "expires": manifest.expires}
        )
        if found := differences(manifest, expected):
            raise DeploymentError(
                f"{path}: clients signed another manifest when the run began, and sign one alone ({'; '.join(found[:5])}); go on as "
                "it began, or start a new run"
            )
        self = cls(manifest, registry)
        for client, signature in signatures.items():
            check_signature(manifest, client, signature, registry)
            self.signatures[client] = signature
        return self


def archived_digest(record: Path) -> bytes:
    """Return the SHA-256 of the manifest in a record, zeros where it has none; raise ProtectionError where it is damaged.

    Whether clients signed it shows where something that is bound to it is checked.
    """
    path = record / FILE
    if not path.exists():
        return UNSIGNED
    with reading(lambda why: ProtectionError(f"{path}: cannot be read ({why}); copy the whole record from the server")):
        return Manifest(**json.loads(path.read_bytes())["manifest"]).digest
