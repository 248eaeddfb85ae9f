"""The greeting between a client and a server: each checks the other, and errors say what is wrong."""

from __future__ import annotations

import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedveil.client.flower import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    public_key_to_bytes,
    sign_message,
)
from fedveil.core.errors import DeploymentError
from fedveil.core.foreign import LONGEST, WORDS, printable, reading
from fedveil.core.proxies import USABLE, Proxy, proxy_for
from fedveil.core.wire.bundle import code

HELLO = "/v1/fedveil/hello"
PATIENCE = 10.0  # seconds to wait for an answer


class Unreachable(DeploymentError):
    """The server does not answer now, and may answer later."""


@dataclass(frozen=True)
class Address:
    """The address of a server; `str` of it is HOST:PORT."""

    host: str
    port: int

    @classmethod
    def parse(cls, words: str) -> Address:
        """Read HOST:PORT, with an IPv6 address in brackets; raise DeploymentError where it is neither."""
        host, colon, port = words.rpartition(":")
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536 or not host.strip("[]"):
            raise DeploymentError(f"--server {words}: must be HOST:PORT, as in server.example:9092")
        if ":" in host and not host.startswith("["):
            raise DeploymentError(f"--server {words}: an IPv6 address belongs in brackets, as in [2001:db8::1]:9092")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _now() -> datetime:
    return datetime.now(UTC)


def greet(address: Address, keys: Path | None, clock: Callable[[], datetime] = _now) -> dict[str, Any]:
    """Send the server this client's signed greeting, and return the server's answer.

    keys: of the client; None speaks plain HTTP and signs nothing
    clock: the time of this machine
    Raise Unreachable where nobody answers; DeploymentError, saying what to do, where one of the two is not whom the
    other expects, their clocks disagree, or they run different versions of FedVeil.
    """
    proxy = find_proxy(address, keys)
    _reach(address, proxy)
    scheme, headers = "http", {}
    verify: ssl.SSLContext | bool = False
    if keys is not None:
        scheme, headers = "https", _signed(keys / "identity.key", clock())
        verify = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    way = None if proxy is None else proxy.url
    try:
        with httpx.Client(verify=verify, timeout=PATIENCE, proxy=way, trust_env=False) as client:
            answer = client.post(f"{scheme}://{address}{HELLO}", headers=headers)
    except httpx.TransportError as error:
        raise _transport(address, error, keys, proxy) from None
    with reading(lambda _: DeploymentError(f"{address}: what answers there is no FedVeil server")):
        told = answer.json()
        reason = printable(str(told.get("error", "")), WORDS)
        if answer.status_code == 200:
            float(told["time"]), float(told["quiet"]), int(told["client"] or 0)
    if answer.status_code != 200:
        if keys is None and answer.status_code == 401:
            raise DeploymentError(f"{address}: the server takes registered clients only; start with --keys DIR")
        raise DeploymentError(f"{address}: the server refuses this client: {reason or answer.status_code}")
    _same_code(address, told)
    return dict(told)


def find_proxy(address: Address, keys: Path | None) -> Proxy | None:
    """Return the proxy between this client and the server, by HTTPS_PROXY and NO_PROXY; plain HTTP goes through none.

    Raise DeploymentError where it is of a kind that cannot be used.
    """
    proxy = None if keys is None else proxy_for(address.host, address.port)
    if proxy is not None and (proxy.scheme not in USABLE or not proxy.host):
        raise DeploymentError(
            f"{address}: the proxy {proxy} is none that can be used: http:// and https:// can; unset {proxy.source}, or go "
            f"around it with NO_PROXY={address.host}"
        )
    return proxy


def _reach(address: Address, proxy: Proxy | None) -> None:
    """Raise Unreachable, with the reason, where no connection to the server, or to the proxy before it, can be made."""
    if proxy is not None:
        try:
            socket.create_connection((proxy.host, proxy.port), timeout=PATIENCE).close()
        except OSError as error:
            why = error.strerror or f"no answer within {PATIENCE:g} s"
            raise Unreachable(
                f"{address}: the proxy {proxy} cannot be reached ({why}); check {proxy.source}, or go around it with "
                f"NO_PROXY={address.host}"
            ) from None
        return
    try:
        socket.create_connection((address.host, address.port), timeout=PATIENCE).close()
    except socket.gaierror as error:
        raise Unreachable(f"{address}: no such host ({error.strerror}); check --server") from None
    except TimeoutError:
        raise Unreachable(
            f"{address}: no answer within {PATIENCE:g} s; check --server, and that no firewall is between"
        ) from None
    except OSError as error:
        raise Unreachable(
            f"{address}: cannot be reached ({error.strerror}); check --server, and that `fedveil server` runs there"
        ) from None


def _transport(
    address: Address, error: httpx.TransportError, keys: Path | None, proxy: Proxy | None
) -> DeploymentError:
    """Return the error that explains a failed exchange."""
    if proxy is not None and isinstance(error, httpx.ProxyError):
        refused = str(error)[:1] == "4"  # by its own rules; anything else may be the server that does not answer it
        return (DeploymentError if refused else Unreachable)(
            f"{address}: the proxy {proxy} makes no connection to it ({printable(str(error), LONGEST)}); let it pass CONNECT to {address}, or go around "
            f"it with NO_PROXY={address.host}"
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        why = {
            10: "the server's certificate has expired; its operator makes another with fedveil keys renew",
            9: "the server's certificate is not valid yet; set the clocks of both machines (NTP)",
            18: "the server's certificate is not signed by the authority in this client's ca.pem: another federation's, or an impostor's",
            19: "the server's certificate is not signed by the authority in this client's ca.pem: another federation's, or an impostor's",
            20: "the server's certificate is not signed by the authority in this client's ca.pem: another federation's, or an impostor's",
            62: f"the server's certificate is not for the name {address.host}; use the name that fedveil keys new --host was given",
            64: f"the server's certificate is not for the address {address.host}; use the name that fedveil keys new --host was given",
        }.get(cause.verify_code, cause.verify_message)
        return DeploymentError(f"{address}: {why}")
    if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return DeploymentError(
            f"{address}: the server does not speak TLS; it runs with --insecure, or is another program"
        )
    if keys is None:
        return DeploymentError(
            f"{address}: no answer in plain HTTP ({printable(str(error), LONGEST)}); a server without --insecure speaks TLS: start with --keys DIR"
        )
    way = f" through the proxy {proxy}" if proxy else ""
    return Unreachable(f"{address}: the connection{way} broke ({printable(str(error), LONGEST)})")


def _signed(identity: Path, now: datetime) -> dict[str, str]:
    """Return headers that name the caller and prove its identity, as Flower's nodes send them."""
    key = load_ssh_private_key(identity.read_bytes(), None)
    timestamp = now.isoformat()
    public = public_key_to_bytes(key.public_key())  # type: ignore[arg-type]
    signature = sign_message(key, timestamp.encode("ascii"))  # type: ignore[arg-type]
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode("ascii"),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
    }


def _same_code(address: Address, told: dict[str, Any]) -> None:
    """Raise DeploymentError where the server runs another version or other code of FedVeil."""
    theirs, ours = (told.get("fedveil"), told.get("code")), (version("fedveil"), code())
    if theirs != ours:
        raise DeploymentError(
            f"{address}: the server runs FedVeil {printable(str(theirs[0]), 40)} (code {printable(str(theirs[1])[:12], 12)}), and this client {ours[0]} (code "
            f"{ours[1][:12]}); install the same on both"
        )


def skew(told: dict[str, Any]) -> float:
    """Return the seconds that this machine's clock is ahead of the server's."""
    return time.time() - float(told["time"])
