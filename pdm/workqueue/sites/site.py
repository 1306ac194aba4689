"""A site: a numbered place with a name and URLs for each protocol it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import field, frozen

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
        alternatives: protocol → further URLs of the same storage.
        owner_id: number of the user who has made it; None for one of the files.
        public: whether everybody may use it; else only its owner.
        limit_in: streams of work that go into it at once, at most; None for what the configuration says.
        limit_out: the same for what comes out of it.
        authorities: PEM of authorities that are trusted for this site only; may be empty.
    """

    id: int
    name: str
    description: str
    default_folder: str
    endpoints: Mapping[JobProtocol, str]
    alternatives: Mapping[JobProtocol, Sequence[str]] = field(factory=dict)
    owner_id: int | None = None
    public: bool = True
    limit_in: int | None = None
    limit_out: int | None = None
    authorities: str = ""
    myproxy: str | None = None

    def doors(self, protocol: JobProtocol) -> Sequence[str]:
        """All URLs of a protocol, the preferred one first; empty where it is not offered."""
        first = self.endpoints.get(protocol)
        return () if first is None else (first, *self.alternatives.get(protocol, ()))

    def is_open_to(self, user_id: int) -> bool:
        """Whether a user may use it."""
        return self.public or self.owner_id == user_id
