"""The architecture: imports point down, each kind of thing has one place, and public names are pinned."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import rlbroker
import rlbroker.errors
from rlbroker.backend.scripts import Script
from rlbroker.learner.run_scripts import SCRIPTS

pytestmark = pytest.mark.unit

SOURCE = Path(rlbroker.__file__).parent

#: Rooms from the lowest layer to the highest. A room imports only from itself and from lower layers.
LAYERS = (
    {"errors"},
    {"config", "types"},
    {"receipts"},
    {"codec"},
    {"backend"},
    {"metrics", "membership"},
    {"weights", "experience", "control"},
    {"learner", "worker"},
    {"__init__"},
    {"local"},
    {"demo"},
    {"ops"},
    {"__main__"},
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}

FILES = sorted(SOURCE.rglob("*.py"))


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down_only(path: Path) -> None:
    room = room_of(path)
    assert all(LAYER_OF[other] < LAYER_OF[room] for other in imported_rooms(path) - {room})


def test_nothing_in_ops_imports_the_command_line() -> None:
    others = [path for path in (SOURCE / "ops").rglob("*.py") if "cli" not in path.relative_to(SOURCE).parts]
    assert not [path for path in others if "rlbroker.ops.cli" in path.read_text()]


def test_only_keys_py_names_redis_keys() -> None:
    named = [path for path in SOURCE.rglob("*.py") if "rlb:{" in path.read_text()]
    assert [path.name for path in named] == ["keys.py"]


def test_every_lua_file_has_a_header_and_is_used() -> None:
    scripts = {str(path.relative_to(SOURCE)): path.read_text() for path in SOURCE.rglob("*.lua")}
    code = "".join(path.read_text() for path in FILES)
    for name, text in scripts.items():
        assert text.startswith("-- "), f"{name} has no header"
        included = any(f"-- include: {name}\n" in other for other in scripts.values())
        assert included or f'Script.load("{name}")' in code, f"{name} is not used"


def test_the_learner_loads_every_script_of_the_library() -> None:
    rooms = {"membership", "weights", "experience", "control"}
    modules = [path.relative_to(SOURCE.parent).with_suffix("") for path in FILES if room_of(path) in rooms]
    found = {
        value
        for module in modules
        for value in vars(import_module(".".join(module.parts))).values()
        if isinstance(value, Script)
    }
    assert found == set(SCRIPTS)


def test_only_config_py_reads_the_environment() -> None:
    readers = {path.name for path in SOURCE.rglob("*.py") if "os.environ.get(" in path.read_text()}
    assert readers == {"config.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_log_record_refers_to_an_error(path: Path) -> None:
    """A handler that keeps records would keep the error's frames, and what those refer to: log its text."""
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        errors = {
            node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name
        }
        errors |= {
            one.arg
            for one in function.args.args
            if one.annotation and issubclass(_named_type(ast.unparse(one.annotation)), BaseException)
        }
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("logger.", "_logger.")):
                named = {one.id for one in call.args if isinstance(one, ast.Name)}
                assert not named & errors, f"{path}:{call.lineno}: log str({', '.join(named & errors)})"


def _named_type(name: str) -> type:
    """Return the type of an annotation if it is one of rlbroker's errors or a builtin; otherwise `object`."""
    found = getattr(rlbroker.errors, name, None) or getattr(builtins, name, object)
    return found if isinstance(found, type) else object


def test_public_names_are_pinned() -> None:
    assert sorted(rlbroker.__all__) == rlbroker.__all__ == PUBLIC
    assert all(hasattr(rlbroker, name) for name in PUBLIC)


def test_torch_is_not_imported_with_the_package() -> None:
    code = "import sys, rlbroker, rlbroker.ops.cli.app; sys.exit('torch' in sys.modules)"
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
    "QueueInfo",
    "RlbrokerError",
    "RoundIncomplete",
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
