"""Addresses and keys of servers in a recipe, checked before a run. No message repeats one that might hold a secret."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from opd.engines.server import fits_header, proxy_of
from opd.errors import ConfigError


def check_address(url: str, where: str) -> None:
    """Raise ConfigError for an invalid address, one that holds more than an address, or an unusable proxy."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{where} is not an address. Begin it with http:// or https:// and name a host.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"{where} holds more than an address, but it is written to the run's folder. Put a key into an "
            "environment variable, and the variable's name into `api_key_env`."
        )
    proxy_of(url)  # raises ConfigError for an unusable proxy


def check_private(url: str, where: str) -> None:
    """Raise ConfigError for an address of neither this machine nor a private network.

    The routes by which weights are updated have no rights of their own: who reaches them controls the server.
    """
    host = urlsplit(url).hostname or ""
    try:
        found = {ipaddress.ip_address(str(one[4][0])) for one in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"{where}: the host {host} cannot be found: {error}. Correct the address.") from error
    if not all(one.is_private or one.is_loopback for one in found):
        raise ConfigError(
            f"{where}: {host} is neither this machine nor in a private network, and a server's control routes "
            "are open to every client. Use a private address, or set `public: true` if the network is closed otherwise."
        )


def own_address(urls: Sequence[str]) -> tuple[str, int]:
    """The address of this machine towards the servers, and a free port there. Raises OSError.

    A server on this machine also reaches it by the address that another machine's server needs.
    """
    found: list[str] = []
    for url in urls:
        host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as one:
            one.connect(place)  # of a datagram: nothing is sent
            found.append(one.getsockname()[0])
    address = min(found, key=lambda one: ipaddress.ip_address(one).is_loopback)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.bind((address, 0))
        return address, one.getsockname()[1]


def check_key(api_key_env: str, where: str) -> None:
    """Raise ConfigError for a name that is no environment variable's, and for a key that is missing or unusable."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise ConfigError(
            f"{where}: `api_key_env` is not the name of an environment variable (letters, digits and _). Give the "
            "name, never the key: recipes are written to the run's folder."
        )
    key = os.environ.get(api_key_env)
    if key and not fits_header(key):  # checked here because the HTTP client's error would show the key
        raise ConfigError(
            f"{where}: the key in the environment variable {api_key_env} has white space, such as a line "
            "break, or another character that keys never have. Export only the key."
        )
    if not key:
        raise ConfigError(
            f"{where}: `api_key_env` names the environment variable {api_key_env}, which is not set or "
            "empty. Export the key in it, or leave `api_key_env` out for a server without keys."
        )


def key_in(api_key_env: str | None) -> str | None:
    """The key in an environment variable that `check_key` accepts. It stays in memory."""
    return None if api_key_env is None else os.environ[api_key_env]
