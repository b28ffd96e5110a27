"""Whether a server can be used for a run, by its INFO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rlbroker.errors import ServerUnsuitable

#: The oldest server that is supported.
MIN_SERVER_VERSION: Final = (6, 2)


def refuse_unsuitable(address: str, info: Mapping[str, str], *, allow_eviction: bool) -> None:
    """Raise `ServerUnsuitable` for a server that is too old or would evict keys; accept one that hides its INFO."""
    if "redis_version" not in info:
        return
    version = info["redis_version"]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MIN_SERVER_VERSION:
        oldest = ".".join(map(str, MIN_SERVER_VERSION))
        raise ServerUnsuitable(f"{address} runs Redis {version}; rlbroker needs {oldest} or newer")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") and not allow_eviction:
        raise ServerUnsuitable(
            f"{address} has maxmemory-policy {policy}, which deletes weights and experiences when memory is "
            "short; set its maxmemory-policy to noeviction (see `rlbroker doctor`), or pass allow_eviction=True"
        )


def is_cluster_node(address: str, info: Mapping[str, str]) -> bool:
    """Return whether a server is a node of a Cluster; raise `ServerUnsuitable` for a Sentinel."""
    mode = info.get("redis_mode", info.get("server_mode"))  # the second is Valkey's name
    if mode == "sentinel":
        raise ServerUnsuitable(
            f"{address} is a Sentinel; write redis+sentinel://host:port/service, with the name of the master "
            "that it monitors (SENTINEL MASTERS shows it)"
        )
    return mode == "cluster"


def name_and_version(info: Mapping[str, str]) -> str:
    """Return the server's name and version; empty if it hides them."""
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}" if "redis_version" in info else ""
