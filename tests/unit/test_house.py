"""The house itself: which way imports point, and which names are public."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rlbroker

SOURCE = Path(rlbroker.__file__).parent

#: What each room may import from, besides itself.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "keys": {"config"},
    "records": {"errors"},
    "crowd": set(),
    "deadline": set(),
    "metrics": set(),
    "replies": set(),
    "clients": {"config", "deadline", "errors", "tls"},
    "packing": set(),
    "refusals": {"errors", "keys"},
    "rights": {"keys"},
    "connection": {
        "clients",
        "config",
        "deadline",
        "errors",
        "keys",
        "packing",
        "servers",
        "tls",
        "translation",
    },
    "translation": {"config", "errors", "refusals", "tls"},
    "servers": {"background", "config", "deadline", "errors", "keys"},
    "tls": {"config", "deadline", "errors"},
    "background": {"deadline", "errors", "outage"},
    "outage": set(),
    "legible": {"errors"},
    "lives": {"config", "connection", "errors", "keys", "replies"},
    "signals": {"errors"},
    "signing": {"errors"},
    "words": set(),
    "history": {"connection", "keys", "metrics", "replies"},
    "recorder": {"connection", "deadline", "errors", "history", "keys", "metrics", "replies"},
    "scalars": {"history"},
    "wire": {"errors"},
    "local": {"config", "errors", "words"},
}
_BELOW = {
    "wire",
    "clients",
    "connection",
    "crowd",
    "packing",
    "refusals",
    "servers",
    "translation",
    "background",
    "outage",
    "deadline",
    "replies",
    "signing",
    "keys",
    "legible",
    "lives",
    "metrics",
    "records",
    "config",
    "errors",
    "words",
}
ALLOWED |= dict.fromkeys(("weights", "experience", "control", "membership"), _BELOW)
_ROOMS = set(ALLOWED) - {"local", "recorder", "scalars"}
ALLOWED |= {
    "learner": _ROOMS | {"recorder", "scalars"},
    "worker": _ROOMS,
    "observer": _ROOMS,
    "pruning": _ROOMS | {"observer"},
    "probe": _ROOMS | {"learner", "worker"},
    "demo": {
        "learner",
        "worker",
        "local",
        "records",
        "keys",
        "config",
        "errors",
        "control",
        "deadline",
        "signals",
        "words",
        "__init__",
    },
    "__main__": {"cli"},
    "cli": _ROOMS | {"demo", "local", "observer", "probe", "pruning", "rights", "__init__"},
    "__init__": {"learner", "worker", "config", "records", "errors", "control"},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} imports relatively"
            names = [node.module] if node.module != "rlbroker" else ["rlbroker.__init__"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rlbroker.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down_only(path: Path) -> None:
    room = room_of(path)
    assert imported_rooms(path) - {room} <= ALLOWED[room]


def test_a_key_is_named_in_one_place_only() -> None:
    named = [path for path in SOURCE.rglob("*.py") if "rlb:{" in path.read_text()]
    assert [path.name for path in named] == ["keys.py"]


def test_the_environment_is_read_in_one_place_only() -> None:
    readers = {path.name for path in SOURCE.rglob("*.py") if "os.environ.get(" in path.read_text()}
    assert readers == {"config.py"}


def test_public_names_are_pinned() -> None:
    assert sorted(rlbroker.__all__) == rlbroker.__all__ == PUBLIC
    assert all(hasattr(rlbroker, name) for name in PUBLIC)


def test_torch_is_not_imported_with_the_package() -> None:
    import subprocess
    import sys

    code = "import sys, rlbroker, rlbroker.cli.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PUBLIC = [
    "AccessDenied",
    "Batch",
    "BatchTooLarge",
    "CleanupReport",
    "Closed",
    "Command",
    "ConnectionFailed",
    "DeadLetter",
    "DeadlineExceeded",
    "Fenced",
    "ForkedProcess",
    "IncompatibleFormat",
    "InvalidArgument",
    "Missed",
    "MissedUpdates",
    "Outcome",
    "PeerError",
    "PublishReceipt",
    "QueueCounts",
    "QueueFull",
    "RlbrokerError",
    "RunLost",
    "SamplesPerInsert",
    "SendReceipt",
    "ServerFault",
    "ServerOutOfMemory",
    "ServerUnsuitable",
    "TlsFailed",
    "Unconfirmed",
    "UnknownWorker",
    "UnsupportedType",
    "UsageError",
    "WeightsMismatch",
    "WireError",
    "WorkerClient",
    "WorkerCommunicator",
    "WorkerInfo",
    "WrongKeyType",
    "__version__",
]
