"""`rlbroker weights`: lists the stored versions, shows their contents, and writes a version to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.exit_codes import EXIT_ERROR
from rlbroker.ops.cli.progress import show_progress
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import format_bytes, sanitize

if TYPE_CHECKING:
    from rlbroker.ops.inspect.stored_weights import FormSummary, StoredWeights
    from rlbroker.ops.inspect.weight_contents import WrittenFile
    from rlbroker.weights.manifest import Manifest, StoredForm

#: Fields of the manifest in the JSON of `weights list`.
_MANIFEST_FIELDS = ("version", "raw_bytes", "codec", "published")

weights = typer.Typer(
    name="weights",
    no_args_is_help=True,
    help="Stored versions of the weights: list them, show the contents of one, or write it to a file.",
)

Version = Annotated[int | None, typer.Argument(min=1, help="The version; by default the latest.")]


@weights.command("list")
@with_session
def list_weights(session: Session) -> None:
    """List the stored versions: full or delta, size, state, and the time until they expire.

    Exit code: 0, or 2 if the server or the run cannot be read.

    Example: rlbroker weights list --run pong
    """
    from rlbroker.ops.inspect.stored_weights import read_stored_weights

    with session.time_limit():
        stored = read_stored_weights(session.connection, session.keys)
    manifest = stored.manifest
    if session.as_json:
        facts = {name: getattr(manifest, name) if manifest else None for name in _MANIFEST_FIELDS}
        facts["version"] = facts["version"] or 0
        session.print_json(
            {"run": session.run, **facts, "forms": [_summary_json(summary) for summary in stored.forms]}
        )
        return
    if manifest is None:
        session.note(f"nothing is published in {session.run} yet")
        return
    session.console.print(
        f"run {session.run}: version {manifest.version:,}, {format_bytes(manifest.raw_bytes)} of tensors, "
        f"{sanitize(manifest.codec)}"
    )
    session.console.print_table(
        [
            {
                "version": f"{summary.form.version:,}",
                "stored as": f"delta to {summary.form.base:,}" if summary.form.base else "full",
                "bytes": format_bytes(summary.form.stored_bytes),
                "chunks": f"{summary.form.chunks:,}",
                "state": summary.state,
                "expires": _describe_expiry(summary),
            }
            for summary in stored.forms
        ],
        text=("stored as", "state", "expires"),
        optional=("chunks",),
        style=lambda column, cell: "red" if (column, cell) == ("state", "damaged") else "",
    )


@weights.command("show")
@with_session
def show_weights(session: Session, version: Version = None) -> None:
    """Show the contents of a version: its tensors with dtype and shape, and its plain values.

    Only the header is downloaded. Exit code: 0; 1 if the version is not stored (any more); 2 if the server or the
    run cannot be read.

    Example: rlbroker weights show 12 --run pong
    """
    from rlbroker.codec.describe import ties
    from rlbroker.ops.inspect.weight_contents import read_contents

    with session.time_limit():
        manifest, path = _find_version(session, version)
        contents = read_contents(session.connection, session.keys, path, key=session.signing_key)
    form = path[-1]
    tensors = [content for content in contents if content.leaf is not None]
    values = [content for content in contents if content.leaf is None]
    tied = ties(tensors)
    raw_bytes = sum({tensor.leaf: tensor.nbytes for tensor in tensors}.values())
    download_bytes = sum(part.stored_bytes for part in path)
    if session.as_json:
        session.print_json(
            {
                "run": session.run,
                **_form_json(form),
                "latest": form.version == manifest.version,
                "raw_bytes": raw_bytes,
                "download_bytes": download_bytes,
                "tensors": [
                    {
                        "name": tensor.name,
                        "kind": tensor.kind,
                        "dtype": tensor.dtype,
                        "original_dtype": tensor.original,
                        "shape": list(tensor.shape),
                        "bytes": tensor.nbytes,
                        "tied_to": tied.get(tensor.name),
                    }
                    for tensor in tensors
                ],
                "values": [
                    {"name": value.name, "kind": value.kind, "value": repr(value.value)} for value in values
                ],
            }
        )
        return
    kind = f"a delta to {form.base:,}" if form.base else "a full version"
    session.console.print(
        f"version {form.version:,} of {session.run}: {counted(len(tensors), 'tensor')}, {format_bytes(raw_bytes)}, "
        f"stored as {kind} in {format_bytes(form.stored_bytes)}; {format_bytes(download_bytes)} to download"
    )
    session.console.print_table(
        [
            {
                "name": sanitize(tensor.name),
                "kind": tensor.kind,
                "dtype": tensor.dtype + (f" (was {tensor.original})" if tensor.original else ""),
                "shape": " × ".join(map(str, tensor.shape)) or "scalar",
                "bytes": (
                    f"tied to {sanitize(tied[tensor.name])}"
                    if tensor.name in tied
                    else format_bytes(tensor.nbytes)
                ),
            }
            for tensor in tensors
        ],
        text=("name", "kind", "dtype", "shape"),
        optional=("kind",),
    )
    for value in values:
        session.console.print(f"{sanitize(value.name)} = {sanitize(repr(value.value))}")


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
            help="A file that ends in .safetensors or .npz; by default RUN-VERSION.safetensors.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Download a version, check it as workers do, and write it to a safetensors or npz file.

    The file is written whole or not at all, and its path printed on stdout. Names are paths joined by dots; dtypes are
    those that were published. An .npz file has bfloat16 and float8 as integers with the same bits, and no plain values.
    Exit code: 0; 1 if the version is not stored (any more); 2 after an error, such as an existing file.

    Example: rlbroker weights pull 12 --run pong --output pong.safetensors
    """
    from rlbroker.errors import WireError
    from rlbroker.ops.inspect import weight_contents
    from rlbroker.ops.inspect.weight_contents import check_file, write_weights

    if output is not None:
        check_file(output, force=force)
    with session.time_limit():
        manifest, path = _find_version(session, version)
    number = path[-1].version
    file = output or Path(f"{session.run}-{number}.safetensors")
    check_file(file, force=force)
    total, done = sum(part.stored_bytes for part in path), 0
    session.note(f"version {number:,}: {format_bytes(total)} in {counted(len(path), 'part')}")
    with show_progress(session, f"version {number}", total, "bytes") as advance:

        def received(count: int) -> None:
            nonlocal done
            done += count
            advance(done)

        try:
            contents, arrays = weight_contents.download_weights(
                session.connection,
                session.keys,
                path,
                chunk_bytes=manifest.chunk_bytes,
                received=received,
                key=session.signing_key,
            )
        except WireError:
            _find_version(session, number)  # raises a better error if the version expired during the download
            raise
    facts = {"run": session.run, "version": number}
    try:
        written = write_weights(file, contents, arrays, facts=facts, force=force)
    except OSError as error:
        session.fail(f"cannot write {file}: {error.strerror or error}", EXIT_ERROR)
    _print_written(session, file, number, written)


def _find_version(session: Session, version: int | None) -> tuple[Manifest, list[StoredForm]]:
    """Return the manifest and the forms to download for a version; end the command if it is not stored."""
    from rlbroker.errors import WireError
    from rlbroker.ops.inspect.stored_weights import read_stored_weights

    stored = read_stored_weights(session.connection, session.keys)
    if stored.manifest is None:
        session.fail(f"nothing is published in {session.run} yet")
    latest = stored.manifest.version
    wanted = version or latest
    try:
        return stored.manifest, stored.path(wanted)
    except WireError:
        session.fail(
            f"version {wanted:,} is not stored{_why_not_stored(wanted, latest)}; {_list_versions(stored)}"
        )


def _why_not_stored(wanted: int, latest: int) -> str:
    if wanted > latest:
        return f": the latest is {latest:,}"
    if wanted == latest:
        return ": a part of it is missing; a live learner publishes it again within seconds"
    return " any more: a version expires within a minute after newer ones have superseded it"


def _list_versions(stored: StoredWeights) -> str:
    versions = ", ".join(f"{version:,}" for version in stored.versions)
    return f"stored versions: {versions}" if versions else "no version is stored whole"


def _describe_expiry(summary: FormSummary) -> str:
    if summary.state in ("damaged", "gone"):
        return "a part is missing"
    return "" if summary.expires_seconds is None else f"in {age(summary.expires_seconds)}"


def _print_written(session: Session, file: Path, version: int, written: WrittenFile) -> None:
    if session.as_json:
        session.print_json(
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
    session.note(f"{counted(written.tensors, 'tensor')}, {format_bytes(written.file_bytes)}")
    if written.as_bits:
        dtypes = ", ".join(sorted(set(written.as_bits.values())))
        arrays = counted(len(written.as_bits), "array holds", "arrays hold")
        session.note(
            f"numpy has no {dtypes}: {arrays} the bits as integers "
            "(bfloat16: (array.astype('uint32') << 16).view('float32'))"
        )
    if written.left_out:
        session.note(f"left out, as they are not arrays: {', '.join(map(sanitize, written.left_out))}")


def _form_json(form: StoredForm) -> dict[str, Any]:
    return {
        "version": form.version,
        "kind": "delta" if form.base else "full",
        "base": form.base,
        "stored_bytes": form.stored_bytes,
        "chunks": form.chunks,
    }


def _summary_json(summary: FormSummary) -> dict[str, Any]:
    return _form_json(summary.form) | {
        "state": summary.state,
        "expires_seconds": summary.expires_seconds,
        "reachable": summary.reachable,
    }
