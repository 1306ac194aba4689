"""Drives DIRAC's FTS3Job; run by the interpreter that has DIRAC: URL PROXY SOURCE DESTINATION."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, ClassVar

from DIRAC import S_OK
from DIRAC.Core.Utilities.ReturnValues import returnValueOrRaise
from DIRAC.DataManagementSystem.Client import FTS3Job as FTS3JobModule
from DIRAC.DataManagementSystem.Client.FTS3File import FTS3File

url, proxy, source, destination = sys.argv[1:5]
roots = {"A": source, "B": destination, "NOWHERE": "gsiftp://192.0.2.1"}


class ConfiguredElement:
    """A storage element, whose URLs DIRAC reads from its configuration service."""

    options: ClassVar[dict[str, str]] = {}
    localStageProtocolList: ClassVar[list[str]] = []  # noqa: N815 - DIRAC's name

    def __init__(self, name: str, vo: str | None = None) -> None:
        self.name = name

    def getStorageParameters(self, protocol: str) -> Any:
        return S_OK({})

    def getStatus(self) -> Any:
        return S_OK({"TapeSE": False})

    def generateTransferURLsBetweenSEs(self, lfns: list[str], other: Any, protocols: Any = None) -> Any:
        urls = {lfn: (roots[other.name] + lfn, roots[self.name] + lfn) for lfn in lfns}
        return S_OK({"Failed": {}, "Protocols": ("gsiftp", "gsiftp"), "Successful": urls})


FTS3JobModule.StorageElement = ConfiguredElement
# DIRAC asks a server of the field for it.
FTS3JobModule.get_scitag = lambda vo, activity=None: 65


def job_of(*lfns: str, at: str = "A") -> Any:
    job = FTS3JobModule.FTS3Job()
    job.type, job.sourceSE, job.targetSE, job.vo, job.priority, job.operationID = "Transfer", at, "B", "dteam", 3, 7
    job.ftsServer, job.username, job.userGroup, job.rmsReqID = url, "alice", "users", 1
    for number, lfn in enumerate(lfns, 1):
        file = FTS3File()
        file.lfn, file.size, file.fileID, file.checksum = lfn, 2000, number, ""
        job.filesToSubmit.append(file)
    return job


context = returnValueOrRaise(FTS3JobModule.FTS3Job.generateContext(url, proxy))
job = job_of("/f1", "/f2", "/nothing")
submitted = sorted(returnValueOrRaise(job.submit(context=context)))
give_up_at = time.monotonic() + 60
while True:
    files = returnValueOrRaise(job.monitor(context=context))
    if job.status in job.FINAL_STATES:
        break
    if time.monotonic() > give_up_at:
        sys.exit(f"not in time: {job.status}")
    time.sleep(0.5)
cancelled = job_of("/never", at="NOWHERE")
returnValueOrRaise(cancelled.submit(context=context))
returnValueOrRaise(cancelled.cancel(context))
lost = job_of("/lost")
lost.ftsGUID = "00000000-0000-0000-0000-000000000000"
lost.monitor(context=context)
found = {
    "submitted": submitted,
    "status": job.status,
    "files": {number: each["status"] for number, each in files.items()},
    "error": files[3]["error"],
    "accounting": [[each["FinalStatus"], each["TransferOK"], each["TransferSize"]] for each in job.accountingDicts],
    "cancelled": cancelled.status,
    "lost": lost.status,
}
sys.stdout.write(json.dumps(found) + "\n")
