"""Read and verify receipts, without the service and in bounded memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec
from attrs import define, field, frozen

from pdm.workqueue.wire.receipts import (
    ALREADY_THERE,
    DONE,
    LONGEST_LINE,
    RECEIPT_VERSION,
    SIGNATURE_MEMBER,
    ReceiptElement,
    ReceiptEnd,
    ReceiptEntry,
    ReceiptJob,
    ReceiptLine,
)

if TYPE_CHECKING:
    # Imported where they are used: commands that verify nothing start sooner.
    from pdm.workqueue.certificates.signatures import Signer
    from pdm.workqueue.certificates.trust import Trust


class ReceiptInvalidError(Exception):
    """A file is no receipt, or not the one that the service has written; the text says what is wrong."""


@frozen
class Receipt:
    """A receipt that was verified: its first line, its last one, and the service that has signed it."""

    job: ReceiptJob
    end: ReceiptEnd
    signer: Signer


def receipt_trust(path: Path) -> Trust:
    """The authorities, from a PEM file or grid-style directory, that are trusted for signatures of receipts.

    Raises:
        CertificateFilesError: nothing there can be trusted.
    """
    from pdm.workqueue.certificates.trust import read_trust

    # Lists are looked into, but not asked to be current: see `verify_detached`.
    return read_trust(path, "off")


def verify_receipt(file: BinaryIO, trust: Trust, now: datetime | None = None) -> Receipt:
    """Verify a receipt in the form ``jsonl``: every line, their number and digest, the signature and its certificate.

    Args:
        file: at its beginning, open in binary mode.
        trust: of `receipt_trust`.
        now: default: the clock of this machine.

    Raises:
        ReceiptInvalidError: what is wrong.
    """
    from pdm.workqueue.certificates.signatures import SignatureInvalidError, verify_detached

    reader = _Reader(file)
    for _ in reader.lines():
        pass
    job, end, last = reader.job, reader.end, reader.last
    if job is None or end is None:
        raise ReceiptInvalidError("the file is truncated: the signed last line is missing")
    signed, found, signature = last.rpartition(SIGNATURE_MEMBER)
    if not found or not signature.endswith(b'"}\n'):
        raise ReceiptInvalidError("the last line has no signature")
    try:
        signer = verify_detached(
            signature[:-3].decode("ascii", "replace"),
            signed + b"}",
            service=job.service.name,
            signed_at=end.signed_at.astimezone(UTC),
            trust=trust,
            now=now or datetime.now(UTC),
        )
    except SignatureInvalidError as error:
        raise ReceiptInvalidError(str(error)) from error
    reader.compare(end)
    return Receipt(job, end, signer)


def read_receipt(file: BinaryIO) -> Iterator[ReceiptLine]:
    """The lines of a receipt, without any proof: `verify_receipt` comes first.

    Raises:
        ReceiptInvalidError: a line cannot be read.
    """
    return _Reader(file).lines()


#: Of the first line of a receipt in the form jsonl.
_BEGINNING = b'{"line":"job"'
_DECODER = msgspec.json.Decoder(ReceiptLine)


@define(eq=False)
class _Reader:
    """Reads the lines of a receipt, and counts what its last line names."""

    _file: BinaryIO
    job: ReceiptJob | None = None
    end: ReceiptEnd | None = None
    last: bytes = b""
    _count: int = 0
    _next_element: int = 0
    #: Where the numbers of the elements first jump: a sentence.
    _gap: str = ""
    _outcomes: Counter[str] = field(factory=Counter)
    _skipped: int = 0
    _size: int = 0
    _digest: hashlib._Hash = field(factory=hashlib.sha256)

    def lines(self) -> Iterator[ReceiptLine]:
        while raw := self._file.readline(LONGEST_LINE + 1):
            number = self._count + 1
            if self.end is not None:
                raise ReceiptInvalidError(f"line {number + 1} comes after the signed last line: it was added")
            if len(raw) > LONGEST_LINE:
                raise ReceiptInvalidError(f"line {number} is longer than any of a receipt")
            if raw.endswith(b"\r\n"):
                raise ReceiptInvalidError(
                    f"line {number} ends with CR LF: the line ends were converted, most likely by an editor or a"
                    " transfer in text mode; verify the file as 'pdm receipt -o FILE' has written it"
                )
            if not raw.endswith(b"\n"):
                raise ReceiptInvalidError(f"the file is truncated: it ends in the middle of line {number}")
            line = self._decoded(raw, number)
            if isinstance(line, ReceiptEnd):
                self.end, self.last = line, raw
            else:
                self._count += 1
                self._digest.update(raw)
                self._add(line)
            yield line

    def _decoded(self, raw: bytes, number: int) -> ReceiptLine:
        try:
            line = _DECODER.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if number == 1 and not raw.startswith(_BEGINNING):
                raise ReceiptInvalidError(
                    "this is no receipt in the form jsonl; only that form is signed, and can be verified"
                ) from error
            raise ReceiptInvalidError(f"line {number} is damaged ({error})") from error
        if (number == 1) != isinstance(line, ReceiptJob):
            if number == 1:
                raise ReceiptInvalidError("the first line, about the job, is missing")
            raise ReceiptInvalidError(f"line {number} is about the job, as the first one is: it was added")
        if isinstance(line, ReceiptJob):
            if line.receipt != RECEIPT_VERSION:
                raise ReceiptInvalidError(f"version {line.receipt} of the format is not known here: update pdm")
            self.job = line
        return line

    def _add(self, line: ReceiptLine) -> None:
        if isinstance(line, ReceiptEntry):
            self._skipped += line.count
        elif isinstance(line, ReceiptElement):
            if line.element != self._next_element and not self._gap:
                self._gap = f": line {self._count} has element {line.element}, not {self._next_element}"
            self._next_element = line.element + 1
            self._outcomes[line.outcome] += 1
            if line.outcome in (DONE, ALREADY_THERE):
                self._size += line.size or 0

    def compare(self, end: ReceiptEnd) -> None:
        """Compare with what the signed last line says.

        Raises:
            ReceiptInvalidError: something else was found.
        """
        if self._count != end.lines:
            what = "are missing" if self._count < end.lines else "were added"
            lost = abs(self._count - end.lines)
            raise ReceiptInvalidError(
                f"{lost} lines {what}: the last line names {end.lines} before it, there are {self._count}{self._gap}"
            )
        if self._digest.hexdigest() != end.sha256:
            raise ReceiptInvalidError(f"a line was changed: the SHA-256 of the lines is not the signed one{self._gap}")
        found = (sum(self._outcomes.values()), dict(sorted(self._outcomes.items())), self._skipped, self._size)
        if found != (end.elements, end.outcomes, end.skipped, end.bytes):
            raise ReceiptInvalidError("the counts in the last line are not those of the lines")
