"""``pdm receipt``, ``errors``: what became of each file of a job, with proof."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import click
from msgspec import UNSET

from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.cli.arguments import JOB_NUMBER, format_option
from pdm.workqueue.cli.display import print_stderr, print_wrapped, table, terminal_width
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.cli.outcome import hint_of, print_json
from pdm.workqueue.cli.session import print_error, run
from pdm.workqueue.client.errors import SettingsError
from pdm.workqueue.client.receipts import (
    Receipt,
    ReceiptInvalidError,
    read_receipt,
    receipt_trust,
    verify_receipt,
)
from pdm.workqueue.client.settings import find_authorities
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import FailureScope
from pdm.workqueue.domain.formatting import display_bytes, display_line, display_name, display_text, display_timestamp
from pdm.workqueue.wire.receipts import ErrorGroupView, ReceiptEnd
from pdm.workqueue.wire.responses import ElementView
from pdm.workqueue.WorkqueueClient import WorkqueueClient


@click.command()
@click.argument("job_id", metavar="[N]", type=JOB_NUMBER, required=False)
@click.option("-o", "--output", metavar="FILE", help="Write to FILE, which appears only when it is complete.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing FILE.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "csv"]),
    help="Lines of JSON, signed by the service (default), or a table for spreadsheets, which is not signed.",
)
@click.option("--verify", metavar="FILE", help="Verify a receipt (- for stdin) instead, without the service.")
@click.option("--ca", metavar="PATH", help="With --verify: the trusted authorities, a PEM file or a directory.")
def receipt(
    job_id: int | None, output: str | None, force: bool, form: str | None, verify: str | None, ca: str | None
) -> None:
    """Get the receipt of job N: what was asked, and what became of every file, signed by the service.

    Or verify one: that no line was changed, lost or added, and that a trusted service has signed it.
    """
    if verify is not None:
        if job_id is not None or output is not None or form is not None or force:
            raise click.UsageError("--verify takes a file and --ca only.")
        _verify(verify, ca)
    if job_id is None:
        raise click.UsageError("Name a job, or a receipt by --verify FILE.")
    if ca is not None:
        raise click.UsageError("--ca requires --verify.")
    if force and output is None:
        raise click.UsageError("-f requires -o FILE.")

    async def action(client: WorkqueueClient) -> None:
        chosen: Literal["jsonl", "csv"] = "csv" if form == "csv" else "jsonl"
        if output is None or output == "-":
            await client.receipt(job_id, _write_stdout, chosen)
            return
        with new_file(Path(output), replace=force) as file:
            await client.receipt(job_id, file.write, chosen)
            if chosen == "jsonl":
                file.seek(0)
                _report(file, job_id)

    run(action)


def _write_stdout(piece: bytes) -> None:
    if sys.stdout.isatty():
        # Paths of others may hold codes that a terminal obeys.
        click.echo(display_text(piece.decode("utf-8", "replace")), nl=False)
    else:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


def _report(file: BinaryIO, job_id: int) -> None:
    """Say what is in a receipt that has arrived."""
    for line in read_receipt(file):
        if isinstance(line, ReceiptEnd):
            note = "" if line.final else "; not final: the job has not ended, or changed meanwhile"
            print_stderr(f"receipt of job {job_id}: {_counts(line)}{note}")


def _counts(end: ReceiptEnd) -> str:
    words = ", ".join(f"{count} {word}" for word, count in end.outcomes.items())
    skipped = f", {end.skipped} skipped" if end.skipped else ""
    return f"{end.elements} elements ({words}){skipped}, {display_bytes(end.bytes)}"


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """A file that gets its name at the end, on disk as a whole; after an error nothing is left.

    Raises:
        CommandError: it exists, or cannot be written.
    """
    if not replace and path.exists():
        raise _exists(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise CommandError(ExitCode.USAGE, f"{display_name(str(path))} cannot be written: {error.strerror}") from error
    part = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            # Fails if somebody else has made the file meanwhile; a rename would replace it.
            path.hardlink_to(part)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise CommandError(ExitCode.FAILED, f"{display_name(str(path))} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _exists(path: Path) -> CommandError:
    return CommandError(ExitCode.USAGE, f"{display_name(str(path))} exists", "Add -f to replace it.")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _verify(name: str, ca: str | None) -> NoReturn:
    """Verify a receipt, and exit."""
    try:
        with open_receipt(name) as file:
            found = verified(file, name, ca)
    except CommandError as error:
        print_error(error.what, error.advice)
        raise SystemExit(error.code) from None
    job, end = found.job.job, found.end
    click.echo(f"{display_name(name)}: valid")
    click.echo(f"job       {job.id}, {job.type} of {display_line(found.job.user)}, {job.status}")
    click.echo(f"elements  {_counts(end)}")
    print_wrapped(f"signed    {display_timestamp(end.signed_at)} by {display_line(found.signer.subject)}", err=False)
    click.echo(f"authority {display_line(found.signer.authority)}")
    if not end.final:
        click.echo("not final: the job had not ended, or changed meanwhile")
    if found.signer.ended_at is not None:
        print_stderr(
            f"warning: the certificate has expired since, at {display_timestamp(found.signer.ended_at)}; the time of"
            " signing is the word of the signer"
        )
    raise SystemExit(ExitCode.DONE)


@contextlib.contextmanager
def open_receipt(name: str) -> Iterator[BinaryIO]:
    """A receipt to read; ``-`` is stdin.

    Raises:
        CommandError: it cannot be read.
    """
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 - errors of reading are others
    except OSError as error:
        code = ExitCode.NOT_FOUND if isinstance(error, FileNotFoundError) else ExitCode.USAGE
        raise CommandError(code, f"{display_name(name)} cannot be read: {error.strerror}") from error
    with file:
        yield file


def verified(file: BinaryIO, name: str, ca: str | None) -> Receipt:
    """Verify a receipt with the authorities at a path, or else with those of the settings.

    Raises:
        CommandError: it is not valid, or there are no authorities.
    """
    try:
        path = Path(ca) if ca is not None else find_authorities(os.environ, Path.home())
        if path is None:
            raise CommandError(ExitCode.USAGE, "there is no authority to verify with", "Name it by --ca, or by PDM_CA.")
        return verify_receipt(file, receipt_trust(path))
    except SettingsError as error:
        raise CommandError(ExitCode.USAGE, error.what, error.advice) from error
    except CertificateFilesError as error:
        raise CommandError(ExitCode.USAGE, str(error)) from error
    except ReceiptInvalidError as error:
        raise CommandError(ExitCode.FAILED, f"{display_name(name)} is not valid: {error}") from error
    except OSError as error:
        raise CommandError(ExitCode.USAGE, f"{display_name(name)} cannot be read: {error.strerror}") from error


@click.command()
@click.argument("job_id", metavar="N", type=JOB_NUMBER)
@click.option("--paths", is_flag=True, help="Print the path of each failed element instead, one a line.")
@click.option("--code", help="Only failures with this code.")
@format_option
def errors(job_id: int, paths: bool, code: str | None, form: str) -> None:
    """Show the failures of job N in groups: code, side, number, an example, and what to do.

    RETRY says whether 'pdm retry' can help while nothing else has changed.
    """
    wanted = None if code is None else code.upper()

    async def action(client: WorkqueueClient) -> None:
        if paths:
            elements = client.iterate_elements(job_id, status=JobStatus.FAILED, code=wanted)
            if form == "json":
                print_json([element async for element in elements])
                return
            async for element in elements:
                click.echo(display_name(_path_of(element)))
            return
        job = await client.job(job_id)
        groups = [group for group in await client.errors(job_id) if wanted in (None, group.code)]
        if form == "json":
            print_json(groups)
            return
        if not groups:
            print_stderr(f"job {job_id} has no failures")
            return
        click.echo(_groups_table(groups))
        hints = {group.code: hint_of(group.code, group.hint, job.type, job_id) for group in groups}
        for each, hint in hints.items():
            print_wrapped(f"{each}: {hint}", err=False)

    run(action)


def _path_of(element: ElementView) -> str:
    failure = element.failure
    at_destination = failure is not None and failure.scope == FailureScope.DESTINATION
    return element.dst_filepath if at_destination and element.dst_filepath is not UNSET else element.src_filepath


def _groups_table(groups: list[ErrorGroupView]) -> str:
    header = ["CODE", "WHERE", "COUNT", "RETRY", "EXAMPLE"]
    rows = []
    for group in groups:
        at_destination = group.scope == FailureScope.DESTINATION and group.dst_filepath is not UNSET
        path = group.dst_filepath if at_destination and group.dst_filepath is not UNSET else group.src_filepath
        again = "held" if group.held == group.count else "yes" if group.retryable else "no"
        rows.append([group.code, group.scope, str(group.count), again, display_name(path)])
    return table(header, rows, right=[2], width=terminal_width(sys.stdout), flexible=[4])
