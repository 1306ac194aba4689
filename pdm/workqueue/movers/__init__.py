"""How each protocol is moved: which helper does it, what it is asked, and what its failures mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from twisted.logger import Logger

from pdm.workqueue.domain.credentials import CredentialNeed
from pdm.workqueue.domain.enums import RELAYED, TOOL_PROTOCOLS, JobProtocol, JobType
from pdm.workqueue.movers.dummy import DummyMover
from pdm.workqueue.movers.gridftp import GridFtpMover
from pdm.workqueue.movers.mover import Access, Mover, credential_need
from pdm.workqueue.movers.relayed import RelayedMover
from pdm.workqueue.movers.tools import ToolsMover

_log = Logger()

#: Where packages name their movers: ``XROOT = my_package:MyMover``.
ENTRY_POINTS = "pdm_workqueue.movers"

#: The movers that come with the service.
BUILT_IN: Mapping[JobProtocol, Mover] = MappingProxyType(
    {
        **{protocol: RelayedMover(protocol) for protocol in sorted(RELAYED)},
        JobProtocol.GRIDFTP: GridFtpMover(),
        JobProtocol.DUMMY: DummyMover(),
    }
)

#: Those that have the field's own commands do it: for sites with ``mover = tools``, and jobs with that option.
TOOL_MOVERS: Mapping[JobProtocol, ToolsMover] = MappingProxyType(
    {protocol: ToolsMover(protocol) for protocol in TOOL_PROTOCOLS}
)


def installed(found: Iterable[EntryPoint]) -> dict[JobProtocol, Mover]:
    """The movers of installed packages; one that cannot be used is left out, and the log says why.

    Args:
        found: entry points, each named after a protocol.
    """
    movers: dict[JobProtocol, Mover] = {}
    for point in found:
        protocol = JobProtocol.__members__.get(point.name)
        if protocol is None or protocol in movers:
            why = "is no protocol" if protocol is None else "has a mover of another package"
            _log.error("the mover {value} is not used: {name} {why}", value=point.value, name=point.name, why=why)
            continue
        try:
            movers[protocol] = point.load()()
        except Exception:
            _log.failure("the mover {value} is not used", value=point.value)
    return movers


#: What the service can move. A protocol that is not here is refused when a job is submitted.
MOVERS: Mapping[JobProtocol, Mover] = MappingProxyType({**BUILT_IN, **installed(entry_points(group=ENTRY_POINTS))})


def mover_of(protocol: JobProtocol, destination: JobProtocol | None = None, *, by_tools: bool) -> Mover | None:
    """The mover of a protocol; None if there is none.

    ``destination``: the protocol by which the destination is reached, if there is one.
    """
    if by_tools:
        return TOOL_MOVERS[protocol]
    mover = MOVERS.get(protocol)
    if destination in (None, protocol) or not isinstance(mover, GridFtpMover | RelayedMover):
        return mover
    return RelayedMover(protocol, destination)


class OfferedMovers:
    """What a service offers by its movers.

    Args:
        movers: for jobs and sites.
        access: files that every helper may read.
    """

    def __init__(self, movers: Mapping[JobProtocol, Mover], access: Access) -> None:
        self._movers = movers
        self._access = access

    def supports(self, protocol: JobProtocol, type_: JobType) -> bool:
        """Whether jobs of a type can use a protocol."""
        return protocol in self._movers and type_ in self._movers[protocol].job_types

    def credential_need(self, protocol: JobProtocol) -> CredentialNeed | None:
        """What a site with this protocol needs; None for nothing."""
        mover = self._movers.get(protocol)
        return None if mover is None else credential_need(mover, self._access)

    def relays_to(self, protocol: JobProtocol) -> frozenset[JobProtocol]:
        """Other protocols of the destination of a copy from this one."""
        mover = self._movers.get(protocol)
        return frozenset() if mover is None else mover.relays_to
