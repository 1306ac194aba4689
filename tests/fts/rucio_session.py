"""Drives Rucio's transfertool; run by the interpreter that has Rucio: URL SOURCE DESTINATION."""

from __future__ import annotations

import json
import sys
import time
import uuid
from types import SimpleNamespace
from typing import Any

from rucio.transfertool.fts3 import FTS3Transfertool


class Rse:
    """A storage of Rucio, as much of it as the transfertool reads."""

    def __init__(self, name: str) -> None:
        self.name, self.id = name, uuid.uuid4().hex
        self.attributes = {"supported_checksums": "adler32"}

    def is_tape(self) -> bool:
        return False

    is_tape_or_staging_required = is_tape


class Transfer:
    """A transfer of Rucio, as much of it as the transfertool reads."""

    def __init__(self, name: str, destination: str, sources: list[str]) -> None:
        self.rws = SimpleNamespace(
            request_id=uuid.uuid4().hex,
            scope="user.x",
            name=name,
            activity="User Subscriptions",
            request_type="TRANSFER",
            byte_count=2000,
            md5=None,
            adler32=None,
            account="root",
            priority=3,
            attributes={},
            rule_id="rule",
        )
        self.sources = [SimpleNamespace(rse=Rse(f"SOURCE{number}"), url=url) for number, url in enumerate(sources)]
        self.src = self.sources[0]
        self.dst = SimpleNamespace(rse=Rse("DESTINATION"))
        self.dest_url = f"{destination}/{name}"

    def source_url(self, source: Any) -> str:
        return str(source.url)


def main(url: str, source: str, destination: str) -> None:
    tool = FTS3Transfertool(url, group_bulk=200)
    requests: dict[str, dict[str, dict[str, Any]]] = {}

    def submit(*transfers: Transfer) -> str:
        (job,) = tool.group_into_submit_jobs([[each] for each in transfers])
        fts_id = tool.submit(job["transfers"], job["job_params"])
        requests[fts_id] = {each.rws.request_id: {"request_id": each.rws.request_id} for each in transfers}
        # As if the answer had been lost.
        repeated.append(tool.submit(job["transfers"], job["job_params"]) == fts_id)
        return str(fts_id)

    repeated: list[bool] = []
    bulk = submit(*(Transfer(f"r{number}", destination, [f"{source}/f{number}"]) for number in range(1, 6)))
    several = submit(Transfer("several", destination, [f"{source}/nothing", f"{source}/f7"]))
    unknown = str(uuid.uuid4())
    requests[unknown] = {}
    give_up_at = time.monotonic() + 60
    while True:
        answers = tool.bulk_query(requests)
        reports = {each: list((answers[each] or {}).values()) for each in (bulk, several)}
        states = {each: [report.file_response["file_state"] for report in reports[each]] for each in reports}
        if all(found and set(found) <= {"FINISHED", "FAILED"} for found in states.values()):
            break
        if time.monotonic() > give_up_at:
            sys.exit(f"not in time: {states}")
        time.sleep(0.5)
    last = reports[several][0]
    slow = submit(Transfer("slow", destination, ["gsiftp://192.0.2.1/x"]))
    found = {
        "version": tool.version()["api"]["major"],
        "user": tool.whoami()["user_dn"],
        "same id again": all(repeated),
        "bulk": states[bulk],
        "unknown": answers[unknown],
        "several sources": [last.file_response["source_surl"].rpartition("/")[2], last.job_response["job_state"]],
        "details": len(tool.query([several], details=True)),
        "priority": tool.update_priority(slow, 5)["priority"],
        "cancelled": tool.cancel([slow])["job_state"],
    }
    sys.stdout.write(json.dumps(found) + "\n")


main(*sys.argv[1:4])
