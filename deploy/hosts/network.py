"""Several hosts on one machine: network namespaces at one switch, each behind a link of 1 Gbit/s."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: What one direction of a link carries. The burst is larger than the largest packet that a veth takes (64 KB).
SHAPER = ("root", "tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms")

#: 198.18.0.0/15 is set aside for tests of networks (RFC 2544). Nothing of it is seen outside the namespaces.
SUBNET = "198.18.0"


@dataclass(frozen=True)
class Host:
    """One host of the network."""

    name: str
    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Give the command line that runs a command on this host, under this host's name.

        Each step replaces itself by the next: the process that is started is the command itself.
        """
        named = 'hostname "$0" && exec "$@"'
        return [
            "ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, self.name, *arguments
        ]  # fmt: skip


class Network:
    """Hosts at a switch. Cutting one off leaves its link up: frames no longer pass the switch, and nobody is told."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Name the hosts and their addresses; `opened` makes them."""
        prefix = f"rlb{os.getpid()}"
        self._switch = f"{prefix}-switch"
        self.hosts = {
            name: Host(name, f"{prefix}-{name}", f"{SUBNET}.{number}") for number, name in enumerate(hosts, 1)
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[Network]:
        """Make all of it, and remove all of it in the end, with whatever still runs in it.

        Raises:
            RuntimeError: the system refused; its message is in it.
        """
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "switch", "up")
            for host in self.hosts.values():
                self._connect(host)
            yield self
        finally:
            for host in self.hosts.values():
                _remove(host.namespace)
            _remove(self._switch)

    def _connect(self, host: Host) -> None:
        """Add a host: `eth0` there, and a port of its name at the switch."""
        here, there = ("-n", self._switch), ("-n", host.namespace)
        _run("ip", "netns", "add", host.namespace)
        _run("ip", *here, "link", "add", host.name, "type", "veth", "peer", "eth0", "netns", host.namespace)
        _run("ip", *there, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", *there, "link", "set", device, "up")
        _run("ip", *here, "link", "set", host.name, "master", "switch", "up")
        _run("tc", *there, "qdisc", "add", "dev", "eth0", *SHAPER)
        _run("tc", *here, "qdisc", "add", "dev", host.name, *SHAPER)

    def cut(self, host: Host) -> None:
        """Cut a host off, as where a cable breaks behind the next switch: its own link stays up."""
        _run("ip", "-n", self._switch, "link", "set", host.name, "nomaster")

    def mend(self, host: Host) -> None:
        """Connect it again."""
        _run("ip", "-n", self._switch, "link", "set", host.name, "master", "switch")

    def received_bytes(self, host: Host) -> int:
        """Give how many bytes the host's link has brought to it until now."""
        said = json.loads(_run("ip", "-n", self._switch, "-s", "-j", "link", "show", "dev", host.name))
        return int(said[0]["stats64"]["tx"]["bytes"])


def _remove(namespace: str) -> None:
    with contextlib.suppress(RuntimeError):  # it may not have come so far
        for pid in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        _run("ip", "netns", "del", namespace)


def _run(*command: str) -> str:
    # In a session of its own: Ctrl-C shall not end it halfway.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True, timeout=30
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
