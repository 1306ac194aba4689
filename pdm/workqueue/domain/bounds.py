"""What may not begin at present, whatever limits say: the place is away or drained, or the user is banned."""

from __future__ import annotations

from datetime import datetime

from attrs import frozen

from pdm.workqueue.domain.enums import JobProtocol


@frozen
class Bounds:
    """What is kept out of claims, listings as well as all other work.

    Attributes:
        paused: sites that cannot be reached by a protocol.
        probed: sites that may be back, by a protocol: of what has to do with one by that, a single element may run at
            once.
        drained: sites at which nothing starts.
        banned: users of whom nothing starts.
        next_change: when that changes by itself; None if it does not.
    """

    paused: frozenset[tuple[int, JobProtocol]] = frozenset()
    probed: frozenset[tuple[int, JobProtocol]] = frozenset()
    drained: frozenset[int] = frozenset()
    banned: frozenset[int] = frozenset()
    next_change: datetime | None = None

    def keep_out(self, protocol: JobProtocol, sites: frozenset[int]) -> bool:
        """Whether nothing that has to do with some sites by a protocol may begin."""
        return not self.drained.isdisjoint(sites) or any((site, protocol) in self.paused for site in sites)
