"""Two hosts on one machine: a network namespace behind a link of known speed. Needs Linux, root, `ip` and `tc`."""

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

#: Bits per second of the link in each direction.
RATE_BITS = 1_000_000_000

#: The burst of the traffic shaper. It exceeds the largest packet of a veth device (64 KB).
_BURST_BYTES = 256 << 10

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Link:
    """The link from this host to the other one."""

    namespace: str  #: the other host's name
    device: str  #: this host's end
    address: str  #: this host's address on the link

    def sent_bytes(self) -> int:
        """Return the number of bytes that this host has sent over the link so far."""
        return int(Path(f"/sys/class/net/{self.device}/statistics/tx_bytes").read_text())


def unavailable() -> str:
    """Return why this machine cannot simulate a second host, or an empty string if it can."""
    if sys.platform != "linux":
        return "network namespaces exist only on Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    try:
        with two_hosts():  # in a container, root may lack the rights, or the kernel the traffic shaper
            return ""
    except RuntimeError as error:
        return str(error)


@contextlib.contextmanager
def two_hosts() -> Iterator[Link]:
    """Create a second host behind a link. Remove both at the end, even after Ctrl-C or an error.

    Raises:
        RuntimeError: a command failed; the message has its output.
    """
    name = f"rlb{os.getpid()}"
    # 198.18.0.0/15 is reserved for network benchmarks (RFC 2544).
    subnet = f"198.18.{os.getpid() % 256}"
    link = Link(namespace=name, device=f"{name}a", address=f"{subnet}.1")
    other_device = f"{name}b"
    shaper = f"root tbf rate {RATE_BITS}bit burst {_BURST_BYTES}b latency 50ms"
    try:
        _run(f"ip netns add {name}")
        _run(f"ip link add {link.device} type veth peer name {other_device} netns {name}")
        _run(f"ip addr add {subnet}.1/30 dev {link.device}")
        _run(f"ip -n {name} addr add {subnet}.2/30 dev {other_device}")
        _run(f"ip link set {link.device} up")
        _run(f"ip -n {name} link set {other_device} up")
        _run(f"ip -n {name} link set lo up")
        _run(f"tc qdisc add dev {link.device} {shaper}")
        _run(f"tc -n {name} qdisc add dev {other_device} {shaper}")
        yield link
    finally:
        for command in (f"ip link del {link.device}", f"ip netns del {name}"):
            with contextlib.suppress(RuntimeError):  # the device may not exist yet
                _run(command)


def enter(namespace: str) -> None:
    """Move this thread, and the threads that it starts later, to another host.

    Raises:
        OSError: the namespace does not exist, or entering it is not permitted.
    """
    descriptor = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(descriptor)


def _run(command: str) -> None:
    # In its own session: Ctrl-C must not interrupt the command halfway.
    done = subprocess.run(
        command.split(), capture_output=True, text=True, check=False, start_new_session=True, timeout=30
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
