"""`rlbroker weights`: which versions are stored, what they hold, and one of them as a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.ops.cli.formatting import age, counted, plain, show_table, size
from rlbroker.ops.cli.progress import progress
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.inspect.stored_weights import FormSummary, Manifest, StoredForm, StoredWeights
    from rlbroker.ops.inspect.weight_files import Written

weights = typer.Typer(
    name="weights",
    no_args_is_help=True,
    help="Stored versions of the weights: which, what they hold, and as a file.",
)

Version = Annotated[int | None, typer.Argument(min=1, help="Which version; the latest if left out.")]


@weights.command("list")
@with_session
def list_weights(session: Session) -> None:
    """List the versions that are stored: as a whole or as differences, how large, and how long they stay.

    Exit code: 0, or 2 if the server or the run is not there.

    Example: rlbroker weights list --run pong
    """
    from rlbroker.ops.inspect.stored_weights import look_at_weights

    with session.in_time():
        stored = look_at_weights(session.connection, session.keys)
    pointer = stored.pointer
    if session.as_json:
        facts = {name: getattr(pointer, name) if pointer else None for name in _FACTS}
        facts["version"] = facts["version"] or 0
        session.show_json({"run": session.run, **facts, "forms": [_form_json(one) for one in stored.forms]})
        return
    if pointer is None:
        session.say(f"nothing is published in {session.run} yet")
        return
    session.console.print(
        f"run {session.run}: version {pointer.version:,}, {size(pointer.raw_bytes)} of tensors, {plain(pointer.codec)}"
    )
    show_table(
        session.console,
        [
            {
                "version": f"{one.form.version:,}",
                "stored as": f"delta to {one.form.base:,}" if one.form.base else "full",
                "bytes": size(one.form.stored_bytes),
                "chunks": f"{one.form.chunks:,}",
                "state": one.state,
                "stays": _stays(one),
            }
            for one in stored.forms
        ],
        left=("stored as", "state", "stays"),
        spare=("chunks",),
        style=lambda column, cell: "red" if (column, cell) == ("state", "damaged") else "",
    )


@weights.command("show")
@with_session
def show_weights(session: Session, version: Version = None) -> None:
    """Show what a version holds: its tensors with dtypes and shapes, and its plain values. Only headers are read.

    Exit code: 0; 1 if the version is not stored (any more); 2 if the server or the run is not there.

    Example: rlbroker weights show 12 --run pong
    """
    from rlbroker.ops.inspect.weight_contents import ties, weights_contents

    with session.in_time():
        pointer, path = _find(session, version)
        contents = weights_contents(session.connection, session.keys, path, key=session.signing_key)
    form = path[-1]
    leaves = [one for one in contents if one.leaf is not None]
    values = [one for one in contents if one.leaf is None]
    tied = ties(leaves)
    raw_bytes = sum({one.leaf: one.nbytes for one in leaves}.values())
    if session.as_json:
        session.show_json(
            {
                "run": session.run,
                **_form_facts(form),
                "latest": form.version == pointer.version,
                "raw_bytes": raw_bytes,
                "download_bytes": sum(one.stored_bytes for one in path),
                "tensors": [
                    {
                        "name": one.name,
                        "kind": one.kind,
                        "dtype": one.dtype,
                        "original_dtype": one.original,
                        "shape": list(one.shape),
                        "bytes": one.nbytes,
                        "tied_to": tied.get(one.name),
                    }
                    for one in leaves
                ],
                "values": [{"name": one.name, "kind": one.kind, "value": repr(one.value)} for one in values],
            }
        )
        return
    how = f"a delta to {form.base:,}" if form.base else "a full version"
    session.console.print(
        f"version {form.version:,} of {session.run}: {_tensors(len(leaves))}, {size(raw_bytes)}, stored as {how} in "
        f"{size(form.stored_bytes)}; {size(sum(one.stored_bytes for one in path))} to download"
    )
    show_table(
        session.console,
        [
            {
                "name": plain(one.name),
                "kind": one.kind,
                "dtype": one.dtype + (f" (was {one.original})" if one.original else ""),
                "shape": " × ".join(map(str, one.shape)) or "scalar",
                "bytes": f"tied to {plain(tied[one.name])}" if one.name in tied else size(one.nbytes),
            }
            for one in leaves
        ],
        left=("name", "kind", "dtype", "shape"),
        spare=("kind",),
    )
    for one in values:
        session.console.print(f"{plain(one.name)} = {plain(repr(one.value))}")


@weights.command("pull")
@with_session
def pull_weights(
    session: Session,
    version: Version = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Ends in .safetensors or .npz; without it RUN-VERSION.safetensors, here.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Download a version, check it as workers do, and write it to a file that others read.

    The file is whole or not there. Names are paths with dots; dtypes are those in which the weights travelled. An .npz
    has no bfloat16 or float8: it holds their bits as integers; and no plain values. The file's path is on stdout.
    Exit code: 0; 1 if the version is not stored (any more); 2 for errors, such as a file that is there already.

    Example: rlbroker weights pull 12 --run pong --output pong.safetensors
    """
    from rlbroker.errors import WireError
    from rlbroker.ops.inspect import weight_contents
    from rlbroker.ops.inspect.weight_files import check_file, write_weights

    if output is not None:
        check_file(output, force=force)
    with session.in_time():
        pointer, path = _find(session, version)
    number = path[-1].version
    file = output or Path(f"{session.run}-{number}.safetensors")
    check_file(file, force=force)
    total, done = sum(form.stored_bytes for form in path), 0
    session.say(f"version {number:,}: {size(total)} in {counted(len(path), 'part')}")
    with progress(session, f"version {number}", total, "bytes") as advance:

        def received(count: int) -> None:
            nonlocal done
            done += count
            advance(done)

        try:
            contents, arrays = weight_contents.pull_weights(
                session.connection,
                session.keys,
                path,
                chunk_bytes=pointer.chunk_bytes,
                received=received,
                key=session.signing_key,
            )
        except WireError:
            _find(session, number)  # it may have expired meanwhile
            raise
    facts = {"run": session.run, "version": number}
    try:
        written = write_weights(file, contents, arrays, facts=facts, force=force)
    except OSError as error:
        session.fail(f"cannot write {file}: {error.strerror or error}", 2)
    _say_written(session, file, number, written)


#: Facts of the pointer that `list` gives.
_FACTS = ("version", "raw_bytes", "codec", "published")


def _find(session: Session, version: int | None) -> tuple[Manifest, list[StoredForm]]:
    """Give the pointer, and how to come to a version; say what is stored if nothing leads there."""
    from rlbroker.errors import WireError
    from rlbroker.ops.inspect.stored_weights import look_at_weights

    stored = look_at_weights(session.connection, session.keys)
    if stored.pointer is None:
        session.fail(f"nothing is published in {session.run} yet")
    latest = stored.pointer.version
    wanted = version or latest
    try:
        return stored.pointer, stored.path(wanted)
    except WireError:
        session.fail(f"version {wanted:,} is not stored{_why_not(stored, wanted)}; {_which(stored)}")


def _why_not(stored: StoredWeights, wanted: int) -> str:
    latest = stored.pointer.version if stored.pointer else 0
    if wanted > latest:
        return f": the latest is {latest:,}"
    if wanted == latest:
        return ": a part of it is missing; a learner that lives publishes it again within some seconds"
    return " any more: versions stay for a minute at most once newer ones have superseded them"


def _which(stored: StoredWeights) -> str:
    there = ", ".join(f"{one:,}" for one in stored.versions)
    return f"stored are: {there}" if there else "none is stored whole"


def _stays(one: FormSummary) -> str:
    if one.state in ("damaged", "gone"):
        return "a part is missing"
    return "" if one.expires_seconds is None else f"{age(one.expires_seconds)} more"


def _form_facts(form: StoredForm) -> dict[str, Any]:
    return {
        "version": form.version,
        "kind": "delta" if form.base else "full",
        "base": form.base,
        "stored_bytes": form.stored_bytes,
        "chunks": form.chunks,
    }


def _form_json(one: FormSummary) -> dict[str, Any]:
    return _form_facts(one.form) | {
        "state": one.state,
        "expires_seconds": one.expires_seconds,
        "reachable": one.reachable,
    }


def _say_written(session: Session, file: Path, version: int, written: Written) -> None:
    if session.as_json:
        session.show_json(
            {
                "run": session.run,
                "version": version,
                "file": str(file),
                "bytes": written.file_bytes,
                "tensors": written.tensors,
                "left_out": list(written.left_out),
                "as_bits": dict(written.as_bits),
            }
        )
    else:
        print(file)
    session.say(f"{_tensors(written.tensors)}, {size(written.file_bytes)}")
    if written.as_bits:
        kinds = ", ".join(sorted(set(written.as_bits.values())))
        session.say(
            f"numpy has no {kinds}: {counted(len(written.as_bits), 'array holds', 'arrays hold')} the bits as integers "
            "(bfloat16: (array.astype('uint32') << 16).view('float32'))"
        )
    if written.left_out:
        session.say(f"left out, as they are no arrays: {', '.join(map(plain, written.left_out))}")


def _tensors(count: int) -> str:
    return counted(count, "tensor")
