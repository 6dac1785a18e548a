"""Bearer tokens between the trainer and its servers."""

from __future__ import annotations

import ipaddress
import os
import secrets

TOKEN_VARIABLE = "R1REWARD_SERVER_TOKEN"  # how a server process gets its token: command lines are public, this is not


def new_token() -> str:
    """256 random bits as text."""
    return secrets.token_urlsafe(32)


def token_from(variable: str) -> str | None:
    """The token in an environment variable; None when it is unset or empty."""
    return os.environ.get(variable) or None


def bearer(token: str | None) -> dict[str, str]:
    """The Authorization header, or none."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable by others."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, not an address
        return host == "localhost"
