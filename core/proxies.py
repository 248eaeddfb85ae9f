"""Proxies: what a connection to another machine goes through, and that a connection to this machine goes through none.

TLS alone goes through a proxy, in a tunnel that it cannot look into (CONNECT); plain HTTP never does.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

LOOPBACK = "localhost,127.0.0.1,::1"
VARIABLES = ("https_proxy", "all_proxy", "http_proxy")
USABLE = ("http", "https")  # SOCKS needs a package that neither Flower's HTTP client nor ours requires


@dataclass(frozen=True)
class Proxy:
    """A proxy. `str` of it says which, without the password that its URL may hold.

    url: with its scheme; source: the variable that names it
    """

    url: str
    source: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port} ({self.source})"

    @property
    def scheme(self) -> str:
        """The kind of the proxy."""
        return urlsplit(self.url).scheme

    @property
    def host(self) -> str:
        """The name or address of the proxy."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port of the proxy; that of its scheme where none is named."""
        return urlsplit(self.url).port or {"http": 80, "https": 443}.get(self.scheme, 1080)


def proxy_for(host: str, port: int) -> Proxy | None:
    """Return the proxy of TLS to a host, by HTTPS_PROXY and ALL_PROXY; None without one, where NO_PROXY names the host, and on loopback."""
    from requests.utils import select_proxy, should_bypass_proxies  # imported where a connection is made

    url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    if _is_loopback(host) or should_bypass_proxies(url, None):
        return None
    found = select_proxy(url, getproxies())
    if not found:
        return None
    names = [name.upper() for name in VARIABLES if found in (os.environ.get(name), os.environ.get(name.upper()))]
    return Proxy(_with_scheme(found), names[0] if names else "the system's settings")


def through(proxy: Proxy | None) -> dict[str, str]:
    """Return variables with which a process goes through this proxy with TLS, or through none; on loopback through none."""
    chosen = {
        "https_proxy": proxy.url if proxy else "",  # empty in small letters: none, whatever the capital ones say
        "all_proxy": "",
        "http_proxy": "",
        "no_proxy": LOOPBACK,
    }
    return chosen | {name.upper(): value for name, value in chosen.items()}


def spare_loopback(environment: MutableMapping[str, str]) -> None:
    """Change the variables of this process, and of those it starts, so that calls on loopback go through no proxy.

    A proxy of a kind that Flower's HTTP client cannot speak to is left out: where one is named, that client does not
    even start, for whatever address.
    """
    spared = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if LOOPBACK not in spared and spared.strip() != "*":  # all is spared, which * says by itself alone
        spared = f"{spared},{LOOPBACK}" if spared else LOOPBACK
    environment["no_proxy"] = environment["NO_PROXY"] = spared
    for name in (*VARIABLES, *map(str.upper, VARIABLES)):
        if urlsplit(_with_scheme(environment.get(name, ""))).scheme not in USABLE:
            del environment[name]


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"http://{url}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
