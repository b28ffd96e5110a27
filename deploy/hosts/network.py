"""Several hosts on one machine: network namespaces at one switch, each with a link of 1 Gbit/s."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: The traffic shaper of one direction of a link. The burst exceeds the largest packet of a veth device (64 KB).
SHAPER = ("root", "tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms")

#: 198.18.0.0/15 is reserved for network tests (RFC 2544). The addresses are not visible outside the namespaces.
SUBNET = "198.18.0"


@dataclass(frozen=True)
class Host:
    """One host of the network."""

    name: str
    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs a command on this host, under this host's name.

        Each program replaces itself with the next one, so the pid of the started process is that of the command.
        """
        script = 'hostname "$0" && exec "$@"'
        return [
            "ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, self.name, *arguments
        ]  # fmt: skip


class Network:
    """Hosts at a switch. A host that is cut off keeps its link up, but the switch drops its frames."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Choose the names and addresses of the hosts. `open` creates them."""
        prefix = f"rlb{os.getpid()}"
        self._switch = f"{prefix}-switch"
        self.hosts = {
            name: Host(name, f"{prefix}-{name}", f"{SUBNET}.{number}") for number, name in enumerate(hosts, 1)
        }

    @contextlib.contextmanager
    def open(self) -> Iterator[Network]:
        """Create the network. At the end remove it, and kill the processes that still run in it.

        Raises:
            RuntimeError: a command failed; the message has its output.
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
        """Add a host: the device `eth0` in its namespace, and a port with its name at the switch."""
        at_switch, at_host = ("-n", self._switch), ("-n", host.namespace)
        _run("ip", "netns", "add", host.namespace)
        _run(
            "ip",
            *at_switch,
            "link",
            "add",
            host.name,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            host.namespace,
        )
        _run("ip", *at_host, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", *at_host, "link", "set", device, "up")
        _run("ip", *at_switch, "link", "set", host.name, "master", "switch", "up")
        _run("tc", *at_host, "qdisc", "add", "dev", "eth0", *SHAPER)
        _run("tc", *at_switch, "qdisc", "add", "dev", host.name, *SHAPER)

    def cut(self, host: Host) -> None:
        """Cut a host off. Its own link stays up, as if a cable broke behind the next switch."""
        _run("ip", "-n", self._switch, "link", "set", host.name, "nomaster")

    def reconnect(self, host: Host) -> None:
        """Connect a host that was cut off."""
        _run("ip", "-n", self._switch, "link", "set", host.name, "master", "switch")

    def received_bytes(self, host: Host) -> int:
        """Return the number of bytes that the host has received over its link so far."""
        links = json.loads(_run("ip", "-n", self._switch, "-s", "-j", "link", "show", "dev", host.name))
        return int(links[0]["stats64"]["tx"]["bytes"])


def _remove(namespace: str) -> None:
    with contextlib.suppress(RuntimeError):  # the namespace may not exist yet
        for pid in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        _run("ip", "netns", "del", namespace)


def _run(*command: str) -> str:
    # In its own session: Ctrl-C must not interrupt the command halfway.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True, timeout=30
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
