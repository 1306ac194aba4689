"""A site: a numbered place with a name and a URL for each protocol it serves."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from pdm.workqueue.domain.enums import JobProtocol


@frozen
class Site:
    """A place where files are.

    Attributes:
        id: the number in the REST API and in the database; stays when the site moves.
        name: what people call it; never looks like a number.
        description: one line for people.
        default_folder: where relative paths begin; absolute, or begins with ``~``.
        myproxy: ``HOST:PORT`` of the MyProxy server at which its users log on; None where it has none.
        endpoints: protocol → URL without path (FILE: with the root folder), percent-encoded, no slash at its end.
        limit_in: streams of work that go into it at once, at most; None for what the configuration says.
        limit_out: the same for what comes out of it.
    """

    id: int
    name: str
    description: str
    default_folder: str
    endpoints: Mapping[JobProtocol, str]
    limit_in: int | None = None
    limit_out: int | None = None
    myproxy: str | None = None
