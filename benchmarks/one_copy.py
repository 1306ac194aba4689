"""One 1 KiB copy between two GridFTP sites on an idle daemon: from submission to DONE, as a program sees it.

Run: ``.venv/bin/python benchmarks/one_copy.py``
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from rig import arguments, client_of, report, rig, spread

FINAL = ("DONE", "FAILED", "CANCELLED")


def main() -> None:
    options = arguments(__doc__ or "", copies=20)
    with rig(with_grid=True) as (service, grid):
        assert grid is not None
        source, destination = (Path(grid["sites"][name]["root"]) for name in ("A", "B"))
        file = source / "one"
        file.write_bytes(os.urandom(1024))
        account = grid["users"]["alice"].get("account")
        if account and os.geteuid() == 0:
            shutil.chown(file, account)
        with client_of(service, "alice") as client:
            client.delegate()
            seconds = []
            # The first one logs in to both sites; it is told apart.
            for number in range(options.copies + 1):
                began = time.perf_counter()
                job = client.copy(1, str(file), 2, f"{destination}/copy{number}")
                while client.status(job.id).status not in FINAL:
                    time.sleep(0.002)
                seconds.append(time.perf_counter() - began)
                assert client.job(job.id).status == "DONE", client.elements(job.id)
                assert (destination / f"copy{number}").read_bytes() == file.read_bytes()
    report(
        "one copy",
        {
            "first copy, with logins (s)": seconds[0],
            f"the next {options.copies}, submit to DONE (s)": spread(seconds[1:]),
            "checksum proven": True,
        },
    )


if __name__ == "__main__":
    main()
