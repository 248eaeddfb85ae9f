"""Who may give orders: the token of the control server, and what it refuses before it reads an order."""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_FILE = "FEDVEIL_TOKEN_FILE"  # environment of who gives orders from another machine: a copy of the token's file
RUN_TOKEN = "FEDVEIL_RUN_TOKEN"  # environment of a run's process: its own token
OPEN = ("/", "/health")  # paths that anybody on the machine may ask for
BODY = 64 << 20  # bytes of an order: settings and words
_TOKEN = re.compile(r"[0-9a-f]{64}")


def new_token() -> str:
    """Return a token that nobody can guess: 256 bits of the operating system's, in hexadecimal."""
    return secrets.token_hex(32)


def token_path(state: Path) -> Path:
    """Return the path of the control server's token."""
    return (state / "control.token").absolute()


def keep_token(state: Path) -> str:
    """Return the control server's token in a folder; make it where there is none, or where others could read it."""
    path = token_path(state)
    with suppress(OSError):
        if not path.stat().st_mode & 0o077 and (found := read_token(path)):
            return found
    path.unlink(missing_ok=True)
    made = new_token()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{made}\n")
    return made


def read_token(path: Path) -> str:
    """Return the token in a file; empty where it holds none. Raise OSError where it cannot be read."""
    with path.open("rb") as file:
        found = file.read(100).decode("ascii", "replace").strip()
    return found if _TOKEN.fullmatch(found) else ""


def proof(token: str, port: int, nonce: str) -> str:
    """Return what shows that a server knows a token, so that the token is sent to no other program.

    port: that it listens on; nonce: random text of who asks
    """
    return hmac.digest(token.encode(), f"fedveil control {port} {nonce}".encode(), "sha256").hex()


def same(given: str, wanted: str) -> bool:
    """Say whether two tokens are the same, in a time that does not tell how much of them is; an empty one never is."""
    return bool(wanted) and hmac.compare_digest(given.encode(), wanted.encode())


class Guard:
    """ASGI: refuses what no order is, before its body is read.

    allowed: says whether a token may ask for a path; where: the token's file, for the message
    vouch: receives the address and port of a connection that brought a token, and the token
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed: Callable[[str, str], bool],
        where: Path,
        vouch: Callable[[tuple[str, int] | None, Hashable], None],
    ) -> None:
        self._app, self._allowed, self._where, self._vouch = app, allowed, where, vouch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the app answer it."""
        refusal = self._refusal(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, why = refusal
        headers = {"connection": "close"} | ({"www-authenticate": "Bearer"} if status == 401 else {})
        await JSONResponse({"error": why, "exit_code": 1}, status, headers)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "a web page of another site gives no orders here"
        if scope["path"] not in OPEN:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._allowed(scope["path"], token.strip()):
                return 401, (
                    f"orders need this server's token, which is in {self._where} for its own user to read; that user's fedveil "
                    f"finds it on this machine, and elsewhere {TOKEN_FILE} names a copy of the file"
                )
        if scope["method"] in ("GET", "HEAD"):
            return None
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "an order is JSON: send it with Content-Type: application/json"
        return too_long(headers, BODY)


def too_long(headers: Headers, most: int) -> tuple[int, str] | None:
    """Return the status and the reason of a request whose body has no known length, or more than `most` bytes."""
    length = headers.get("content-length", "")
    if not length.isdecimal() or len(length) > 20:
        return 411, "a call that does not say how long it is"
    if int(length) > most:
        return 413, f"a call of more than {most >> 20} MiB"
    return None
