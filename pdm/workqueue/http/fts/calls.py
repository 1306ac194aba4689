"""A request of a client of FTS3 and its answer, as the handlers of the door see them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import parse_qsl

from attrs import field, frozen

from pdm.workqueue.domain.fts import vo_of_fqan, vo_of_subject
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.problems import ApiError, InvalidInputError

#: Parameters of one query.
_MOST_PARAMETERS = 50


class DelegationTimeoutError(ApiError):
    """The client is to delegate, then to repeat the request: FTS3's status 419, which HTTP does not know."""

    status: ClassVar[int] = 419
    word: ClassVar[str] = "delegation-needed"
    title: ClassVar[str] = "Authentication Timeout"


@frozen
class FtsUser:
    """Who calls.

    Attributes:
        fqans: VOMS attributes of the presented proxy; shown, not verified.
        vos: of these; without any, one that stands for the user alone.
    """

    caller: Caller
    fqans: Sequence[str]
    vos: Sequence[str]

    @classmethod
    def of(cls, caller: Caller, fqans: Sequence[str]) -> FtsUser:
        found = dict.fromkeys(vo for vo in map(vo_of_fqan, fqans) if vo)
        return cls(caller, tuple(fqans), tuple(found) or (vo_of_subject(caller.subject),))

    @property
    def vo_name(self) -> str:
        """The VO under which the user submits."""
        return self.vos[0]


@frozen(eq=False)
class FtsCall:
    """A request.

    Attributes:
        values: of the path.
        transport: of the connection.
    """

    api: ApiContext
    user: FtsUser
    values: Mapping[str, str]
    raw_query: bytes
    body: bytes = field(repr=False)
    transport: Any = field(repr=False)

    @property
    def caller(self) -> Caller:
        return self.user.caller

    def query(self) -> dict[str, str]:
        """The parameters of the query; the last value of each.

        Raises:
            InvalidInputError: it cannot be read.
        """
        try:
            return dict(
                parse_qsl(
                    self.raw_query.decode("ascii"),
                    keep_blank_values=True,
                    errors="strict",
                    max_num_fields=_MOST_PARAMETERS,
                )
            )
        except ValueError as error:
            raise InvalidInputError(f"the query cannot be read: {error}") from error


@frozen
class FtsAnswer:
    """An answer.

    Attributes:
        content: sent as JSON; bytes and a `JsonStream` as they are.
    """

    content: Any
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(factory=dict)


FtsHandler = Callable[[FtsCall], Awaitable[FtsAnswer]]
