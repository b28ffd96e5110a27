"""Two hosts on one machine: a network namespace behind a link of known speed. Linux, root, `ip` and `tc` only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Bits per second of the link, each way.
RATE_BITS = 1_000_000_000

#: What the shaper lets pass at once: larger than the largest packet that a veth takes (64 KB).
_BURST_BYTES = 256 << 10

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Link:
    """The way from this host to the other one."""

    namespace: str  #: the other host's name
    device: str  #: this host's end
    address: str  #: this host's address on the link

    def sent_bytes(self) -> int:
        """Give how many bytes this host has sent over the link until now."""
        return int(Path(f"/sys/class/net/{self.device}/statistics/tx_bytes").read_text())


def unavailable() -> str:
    """Give why there can be no second host here; empty if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    try:
        with two_hosts():  # in a container root may still lack the right, and the kernel the shaper
            return ""
    except RuntimeError as error:
        return str(error)


@contextlib.contextmanager
def two_hosts() -> Iterator[Link]:
    """Set up a second host behind a link, and remove both in the end, after Ctrl-C and errors too.

    Raises:
        RuntimeError: the system refused; its message is in it.
    """
    name = f"rlb{os.getpid()}"
    # 198.18.0.0/15 is set aside for benchmarks of networks (RFC 2544).
    subnet = f"198.18.{os.getpid() % 256}"
    link = Link(namespace=name, device=f"{name}a", address=f"{subnet}.1")
    there = f"{name}b"
    shaper = f"root tbf rate {RATE_BITS}bit burst {_BURST_BYTES}b latency 50ms"
    try:
        _run(f"ip netns add {name}")
        _run(f"ip link add {link.device} type veth peer name {there} netns {name}")
        _run(f"ip addr add {subnet}.1/30 dev {link.device}")
        _run(f"ip -n {name} addr add {subnet}.2/30 dev {there}")
        _run(f"ip link set {link.device} up")
        _run(f"ip -n {name} link set {there} up")
        _run(f"ip -n {name} link set lo up")
        _run(f"tc qdisc add dev {link.device} {shaper}")
        _run(f"tc -n {name} qdisc add dev {there} {shaper}")
        yield link
    finally:
        for command in (f"ip link del {link.device}", f"ip netns del {name}"):
            with contextlib.suppress(RuntimeError):  # it may not have come so far
                _run(command)


def enter(namespace: str) -> None:
    """Move this thread, and those that it starts, to another host.

    Raises:
        OSError: there is no such namespace, or it may not be entered.
    """
    descriptor = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(descriptor)


def _run(command: str) -> None:
    # In a session of its own: Ctrl-C shall not end it halfway.
    done = subprocess.run(
        command.split(), capture_output=True, text=True, check=False, start_new_session=True, timeout=30
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
