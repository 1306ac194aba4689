"""How each protocol is moved: which helper does it, what it is asked, and what its failures mean."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers.dummy import DummyMover
from pdm.workqueue.movers.file import FileMover
from pdm.workqueue.movers.gridftp import GridFtpMover
from pdm.workqueue.movers.https import HttpsMover
from pdm.workqueue.movers.mover import Mover
from pdm.workqueue.movers.ssh import SshMover

#: What the service can move. A protocol that is not here is refused when a job is submitted.
MOVERS: Mapping[JobProtocol, Mover] = MappingProxyType(
    {
        JobProtocol.GRIDFTP: GridFtpMover(),
        JobProtocol.SSH: SshMover(),
        JobProtocol.HTTPS: HttpsMover(),
        JobProtocol.FILE: FileMover(),
        JobProtocol.DUMMY: DummyMover(),
    }
)
