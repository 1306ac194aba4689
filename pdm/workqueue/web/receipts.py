"""The receipt of a job: as a page, and as a file to keep."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pdm.workqueue.http import transactions
from pdm.workqueue.http.receipts import element_line, first_line, receipt_pieces
from pdm.workqueue.web.jobs import Number
from pdm.workqueue.web.pages import Download, Page, Visit, page
from pdm.workqueue.wire.receipts import CSV, NDJSON

#: Elements on a page.
_PAGE_SIZE = 100


class ReceiptQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which elements: those after a number."""

    after: Number | None = None


class ReceiptFileQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In which form: lines of JSON, which are signed, or CSV."""

    format: Literal["jsonl", "csv"] = "jsonl"


@page("GET", "/web/jobs/<number:job_id>/receipt", query=ReceiptQuery)
async def show_receipt(visit: Visit, job_id: int, query: ReceiptQuery) -> Page:
    """What the job did to every file, in pages."""
    found = await visit.api.database.read(
        "page of a receipt", transactions.receipt_page, job_id, visit.caller.scope, query.after
    )
    lines = [element_line(found, element) for element in found.elements[:_PAGE_SIZE]]
    context: dict[str, Any] = {
        "job_id": job_id,
        "first": first_line(visit.api, found),
        "lines": lines,
        "following": lines[-1].element if len(found.elements) > _PAGE_SIZE else None,
        "is_first_page": query.after is None,
    }
    return Page(template="receipt.html", context=context)


@page("GET", "/web/jobs/<number:job_id>/receipt/download", query=ReceiptFileQuery)
async def download_receipt(visit: Visit, job_id: int, query: ReceiptFileQuery) -> Download:
    """The receipt as a file."""
    first = await visit.api.database.read(
        "page of a receipt", transactions.receipt_page, job_id, visit.caller.scope, None
    )
    media_type = CSV if query.format == "csv" else NDJSON
    pieces = receipt_pieces(visit.api, first, media_type)
    return Download(pieces=pieces, name=f"job-{job_id}-receipt.{query.format}", media_type=media_type)
