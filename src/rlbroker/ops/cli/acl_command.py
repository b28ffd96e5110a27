"""`rlbroker acl`: prints users for the learner, the workers and observers, with only the rights that each needs."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Annotated

import typer

from rlbroker.backend.text import counted
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session

#: The user with all rights in an ACL file.
ADMINISTRATOR = "admin"


@with_session(without=("run",))
def acl(
    session: Session,
    run: Annotated[
        str | None, typer.Option(help="Name of the run; by default RLBROKER_RUN, then 'default'.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=65_536, help="Number of workers, with ids from 0 on.")
    ] = 8,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared", help="One user for all workers: needed if they take any free id (worker_id=None)."
        ),
    ] = False,
    secrets_folder: Annotated[
        Path | None,
        typer.Option(
            "--secrets",
            metavar="FOLDER",
            help="Folder with the users' passwords, one file each; missing ones are generated, with mode 600.",
        ),
    ] = None,
    setuser: Annotated[
        bool,
        typer.Option("--setuser", help="Print commands for a running server instead of an ACL file."),
    ] = False,
    server_version: Annotated[
        str | None,
        typer.Option(
            metavar="X.Y",
            help="Redis version of the server, such as 6.2 or 7.2; by default it is read from the server.",
        ),
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster", help="Print users for a Cluster. Not needed with the --url of a running Cluster."
        ),
    ] = False,
) -> None:
    """Print the users of a run, with rights that fit the server's version.

    A worker writes only its own keys, runs only scripts that the learner loaded, and cannot read other workers'
    batches. Exit code: 0, or 2 after an error.

    Example: rlbroker acl --run pong --workers 50 --secrets pong.secrets --server-version 7.0 > users.acl
    """
    from rlbroker.backend.url import parse_endpoint, redis_url
    from rlbroker.config import DEFAULT_RUN
    from rlbroker.errors import InvalidArgument
    from rlbroker.ops.acl import READ_ONLY_KEYS_VERSION, format_acl_file, format_set_user_commands, make_users

    if secrets_folder is None and not session.as_json:
        raise InvalidArgument(
            "--secrets is missing; name a folder for the passwords, such as --secrets pong.secrets"
        )
    version = _parse_version(server_version) if server_version else _read_version(session)
    kind = parse_endpoint(redis_url(session.url)).kind
    cluster |= kind == "cluster" or (not server_version and session.connection.servers.several)
    run_users = make_users(
        run or session.named_run or DEFAULT_RUN,
        workers=workers,
        shared=shared,
        version=version,
        cluster=cluster,
    )
    if session.as_json:
        session.print_json(
            {"users": [{"name": user.name, "role": user.role, "rules": user.rules} for user in run_users]}
        )
        return
    assert secrets_folder is not None
    names = [user.name for user in run_users] + ([] if setuser else [ADMINISTRATOR])
    passwords, new = _prepare_passwords(secrets_folder, names)
    if setuser:
        lines = format_set_user_commands(run_users, passwords)
    else:
        lines = format_acl_file(run_users, passwords, ADMINISTRATOR)
    print(*lines, sep="\n")
    session.note(f"{counted(new, 'new password')}, {len(names) - new} existing, in {secrets_folder}/<user>")
    if cluster or kind == "sentinel":
        session.note("each node has its own users: add these to every node, replicas included")
    for warning in _warnings(shared=shared, read_only=version >= READ_ONLY_KEYS_VERSION):
        session.note(f"warning: {warning}")


def _read_version(session: Session) -> tuple[int, ...]:
    from rlbroker.errors import InvalidArgument

    version = session.connection.server_info().get("redis_version")
    if version is None:
        raise InvalidArgument(
            "this user may not read the server's version (INFO); set it with --server-version, such as 7.2"
        )
    return _parse_version(version)


def _parse_version(text: str) -> tuple[int, ...]:
    from rlbroker.backend.suitability import MIN_SERVER_VERSION
    from rlbroker.errors import InvalidArgument

    found = re.fullmatch(r"([0-9]+)\.([0-9]+)(\.[0-9]+)*", text)
    if not found:
        raise InvalidArgument(f"--server-version must be a version such as 7.2; got {text!r}")
    version = int(found[1]), int(found[2])
    if version < MIN_SERVER_VERSION:
        raise InvalidArgument(f"rlbroker needs Redis 6.2 or newer; the server is {text}")
    return version


def _prepare_passwords(folder: Path, names: list[str]) -> tuple[dict[str, str], int]:
    """Return each user's password, and how many of them are new. Existing passwords are kept."""
    from rlbroker.errors import InvalidArgument

    passwords, new = dict[str, str](), 0
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            path = folder / name
            if path.exists():
                passwords[name] = path.read_text().strip("\r\n")
                if len(passwords[name].splitlines()) != 1:
                    raise InvalidArgument(
                        f"{path} must hold one line, the password; write it, or delete the file to get a new password"
                    )
            else:
                passwords[name], new = secrets.token_urlsafe(32), new + 1
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(passwords[name] + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--secrets {folder}: {error}") from error
    return passwords, new


def _warnings(*, shared: bool, read_only: bool) -> list[str]:
    """Return what these users can do that their role does not need."""
    warnings = []
    if shared:
        warnings.append(
            "all workers are one user: each can read and write the batches of the others, and take their ids"
        )
    if not read_only:
        warnings.append(
            "before Redis 7 keys cannot be read-only, so a worker can also write weights and commands; use a newer "
            "server, or sign them (RLBROKER_SIGNING_KEY_FILE)"
        )
    return warnings
