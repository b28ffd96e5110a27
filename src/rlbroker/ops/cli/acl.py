"""`rlbroker acl`: users for learner, workers and observers, with no more rights than each needs."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.ops.cli.formatting import counted
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.acl import User

#: The user of an ACL file who may do everything.
ADMINISTRATOR = "admin"


@with_session
def acl(
    session: Session,
    workers: Annotated[
        int, typer.Option(min=1, max=65_536, help="How many workers there are to be, with ids from 0 on.")
    ] = 8,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared", help="One user for all workers, for those that take any free id (worker_id=None)."
        ),
    ] = False,
    secrets_folder: Annotated[
        Path | None,
        typer.Option(
            "--secrets",
            metavar="FOLDER",
            help="Where each user's password is, or is put: a file each, mode 600.",
        ),
    ] = None,
    setuser: Annotated[
        bool,
        typer.Option("--setuser", help="Commands for a server that runs, instead of lines for an ACL file."),
    ] = False,
    server_version: Annotated[
        str | None,
        typer.Option(
            metavar="X.Y", help="What Redis the server is like, where none runs yet: 6.2, 7.0, 7.2 …"
        ),
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="For a Cluster that does not run yet; one that does says it itself."),
    ] = False,
) -> None:
    """Print the users of a run, with the rights that the server's version lets them be given.

    A worker writes nothing but its own keys, runs no scripts of its own, and reads no batches of others.

    Exit code: 0; 2 if something is wrong.

    Example: rlbroker acl --run pong --workers 50 --secrets pong.secrets --server-version 7.0 > users.acl
    """
    from rlbroker.backend.url import parse_endpoint, redis_url
    from rlbroker.config import DEFAULT_RUN
    from rlbroker.errors import InvalidArgument
    from rlbroker.ops.acl import READ_ONLY_KEYS, acl_file, set_user_commands, users

    if secrets_folder is None and not session.as_json:
        raise InvalidArgument("--secrets names a folder for the passwords, such as --secrets pong.secrets")
    version = _numbers(server_version) if server_version else _version_of(session)
    kind = parse_endpoint(redis_url(session.url)).kind
    cluster |= kind == "cluster" or (not server_version and session.connection.servers.several)
    found = users(
        session.named_run or DEFAULT_RUN, workers=workers, shared=shared, version=version, cluster=cluster
    )
    if session.as_json:
        session.show_json(
            {"users": [{"name": one.name, "role": one.role, "rules": one.rules} for one in found]}
        )
        return
    assert secrets_folder is not None
    names = [one.name for one in found] + ([] if setuser else [ADMINISTRATOR])
    passwords, made = _passwords(secrets_folder, names)
    lines = set_user_commands(found, passwords) if setuser else acl_file(found, passwords, ADMINISTRATOR)
    print(*lines, sep="\n")
    session.say(
        f"{counted(made, 'new password')}, {len(names) - made} that were there, in {secrets_folder}/<user>"
    )
    if cluster or kind == "sentinel":
        session.say("each node has users of its own: give these to every one, the replicas too")
    for warning in _given_up(found, shared=shared, read_only=version >= READ_ONLY_KEYS):
        session.say(f"warning: {warning}")


def _version_of(session: Session) -> tuple[int, ...]:
    from rlbroker.errors import InvalidArgument

    said = session.connection.server_info().get("redis_version")
    if said is None:
        raise InvalidArgument(
            "this user may not ask for the server's version (INFO); say it with --server-version 7.2"
        )
    return _numbers(said)


def _numbers(text: str) -> tuple[int, ...]:
    from rlbroker.backend.suitability import MIN_SERVER_VERSION
    from rlbroker.errors import InvalidArgument

    found = re.fullmatch(r"([0-9]+)\.([0-9]+)(\.[0-9]+)*", text)
    if not found:
        raise InvalidArgument(f"--server-version is a number such as 7.2; got {text!r}")
    version = int(found[1]), int(found[2])
    if version < MIN_SERVER_VERSION:
        raise InvalidArgument(f"rlbroker needs Redis 6.2 or newer; the server is {text}")
    return version


def _passwords(folder: Path, names: list[str]) -> tuple[dict[str, str], int]:
    """Give each user's password, and how many are new: what is in the folder stays."""
    from rlbroker.errors import InvalidArgument

    passwords, made = dict[str, str](), 0
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            path = folder / name
            if path.exists():
                passwords[name] = path.read_text().strip("\r\n")
                if len(passwords[name].splitlines()) != 1:
                    raise InvalidArgument(
                        f"{path} holds no password: put one line into it, or delete it to get a new one"
                    )
            else:
                passwords[name], made = secrets.token_urlsafe(32), made + 1
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(passwords[name] + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--secrets {folder}: {error}") from error
    return passwords, made


def _given_up(found: list[User], *, shared: bool, read_only: bool) -> list[str]:
    warnings = []
    if shared:
        warnings.append(
            "all workers are one user: any of them can write, and read, the batches of the others, and take their place"
        )
    if not read_only:
        warnings.append(
            "before Redis 7 keys cannot be read-only: a worker can write weights and commands too. Use a newer server, "
            "or sign them (RLBROKER_SIGNING_KEY_FILE)"
        )
    return warnings
