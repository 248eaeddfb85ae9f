"""A stranger who holds connections to a server and opens each anew that is ended: `python stranger.py HOST PORT CONNECTIONS`.

A third says nothing, a third sends half a request in TLS, and a third sends its headers letter by letter.
"""

from __future__ import annotations

import socket
import ssl
import sys
import time

HALF = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n"
PACE = 0.02  # seconds between connections that are opened anew: all parties of the test share a processor


def connect(host: str, port: int, kind: int, loose: ssl.SSLContext) -> socket.socket | None:
    """A connection of a kind; None where the server takes none at this moment."""
    try:
        line = socket.create_connection((host, port), timeout=5)
        if kind:
            line = loose.wrap_socket(line)
            line.sendall(HALF)
        line.setblocking(False)
    except OSError:
        return None
    return line


def alive(line: socket.socket | None, kind: int) -> bool:
    """Whether the server still holds a connection; a slow one gets its next letters."""
    if line is None:
        return False
    try:
        if kind == 2:
            line.send(b"a: b\r\n")
        return line.recv(1) != b""
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    except OSError:
        return False


def main(host: str, port: int, connections: int) -> None:
    loose = ssl.create_default_context()
    loose.check_hostname, loose.verify_mode = False, ssl.CERT_NONE
    held = [connect(host, port, number % 3, loose) for number in range(connections)]
    print(f"opened {connections} connections", flush=True)
    while True:
        for number, line in enumerate(held):
            if not alive(line, number % 3):
                if line is not None:
                    line.close()
                held[number] = connect(host, port, number % 3, loose)
                time.sleep(PACE)
        time.sleep(PACE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
