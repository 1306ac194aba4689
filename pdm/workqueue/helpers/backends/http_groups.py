"""Several requests to one HTTPS server at once, over kept connections of one thread."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.http_client import REDIRECTS, Headers, HttpClient, HttpResponse
from pdm.workqueue.helpers.backends.http_connection import REMIND_S, HttpConnection
from pdm.workqueue.helpers.backends.http_servers import Server, known_server
from pdm.workqueue.helpers.storage import StorageError

#: Requests under way at once, each on a connection of its own, for each worker thread of the helper.
MAX_CONNECTIONS = 16
#: Seconds that a request waits for a response to another rather than for a new connection, with its TLS handshake.
_WORTH_WAITING_S = 0.01

_T = TypeVar("_T")


class GroupRequest(NamedTuple):
    """A request that is sent together with others.

    Attributes:
        method: of HTTP.
        url: at the server of all of them.
        headers: besides those of the credential.
        body: all of it.
        most: bytes of a response's body that are kept.
    """

    method: str
    url: StorageUrl
    headers: Headers = MappingProxyType({})
    body: bytes = b""
    most: int = 0


class GroupAnswer(NamedTuple):
    """The response to such a request.

    Attributes:
        method: of the request.
        response: its head.
        body: as many bytes of it as were wanted, and perhaps more.
    """

    method: str
    response: HttpResponse
    body: bytes

    @property
    def is_success(self) -> bool:
        return HTTPStatus.OK <= self.response.status < HTTPStatus.MULTIPLE_CHOICES


#: The request that follows an answer, and is sent before those that wait; None if none does.
NextStep = Callable[[GroupRequest, GroupAnswer | None], GroupRequest | None]


class _UnderWay:
    """A request that was sent.

    Attributes:
        number: of the request in its group.
        request: what was sent.
        connection: on which.
        was_kept: whether the connection has had another request before.
        error: why it could not be sent.
    """

    def __init__(self, number: int, request: GroupRequest, connection: HttpConnection) -> None:
        self.number = number
        self.request = request
        self.connection = connection
        self.was_kept = connection.is_used
        self.error: StorageError | None = None


class RequestGroup:
    """Sends groups of requests of one thread.

    Args:
        client: of the thread.
        check: raises an error if the requests must end.
        headers_of: all headers of a request, with its credential.
        alone: sends one request by itself, after its connection was lost or its server redirects; None for a refusal.
    """

    def __init__(
        self,
        client: HttpClient,
        check: Callable[[], None],
        headers_of: Callable[[GroupRequest], Headers],
        alone: Callable[[GroupRequest], GroupAnswer | None],
    ) -> None:
        self._client = client
        self._check = check
        self._headers_of = headers_of
        self._alone = alone

    def answers(
        self,
        requests: Sequence[GroupRequest],
        next_step: NextStep | None = None,
    ) -> list[GroupAnswer | None]:
        """Responses to requests to one server; None where there is none and the request may have been carried out.

        Args:
            requests: which the server may carry out in any order.
            next_step: called with each answer; the answer to the last of the requests that follow each other is
                returned.

        Raises:
            StorageError: the server cannot be reached.
            StoppedError: it must end.
        """
        answers: list[GroupAnswer | None] = [None] * len(requests)
        if not requests:
            return answers
        server = known_server(requests[0].url)
        waiting = deque(enumerate(requests))
        #: By descriptor, the oldest first.
        under_way: dict[int, _UnderWay] = {}
        poller = select.poll()
        try:
            while waiting or under_way:
                ready = self._send(server, waiting, under_way, poller)
                if under_way and not ready:
                    # After some silence the oldest request is waited for alone: that finds the reason.
                    ready = poller.poll(min(REMIND_S, self._client.timeouts.stall_s) * 1000)
                for descriptor in [found for found, _ in ready] or list(under_way)[:1]:
                    poller.unregister(descriptor)
                    each = under_way.pop(descriptor)
                    answer = answers[each.number] = self._answer(server, each)
                    if next_step is not None and (following := next_step(each.request, answer)) is not None:
                        waiting.appendleft((each.number, following))
        finally:
            for each in under_way.values():
                self._client.close(each.connection)
        return answers

    def _send(
        self,
        server: Server,
        waiting: deque[tuple[int, GroupRequest]],
        under_way: dict[int, _UnderWay],
        poller: select.poll,
    ) -> list[tuple[int, int]]:
        """Send requests, until all connections have one or a response is there; returns what `select.poll` has found.

        A request waits for a response to another rather than for a new connection, if the server is fast.
        """
        while waiting and len(under_way) < MAX_CONNECTIONS:
            is_new = not self._client.has_idle(server)
            if under_way and is_new and (ready := poller.poll(_WORTH_WAITING_S * 1000)):
                return ready
            self._check()
            number, request = waiting.popleft()
            self._client.check_name(request.url)
            each = _UnderWay(number, request, self._client.connected(server))
            descriptor = each.connection.fileno()
            under_way[descriptor] = each
            poller.register(descriptor, select.POLLIN)
            try:
                with self._client.translated_errors(server, each.connection):
                    headers = self._headers_of(request)
                    each.connection.begin(request.method, request.url.encoded_path, headers, request.body)
            except StorageError as error:
                each.error = error
            if each.error is not None or each.connection.has_answer:
                return [(descriptor, select.POLLIN)]
        return []

    def _answer(self, server: Server, each: _UnderWay) -> GroupAnswer | None:
        """The response to a request that was sent; asked for again where that cannot do harm."""
        request = each.request
        try:
            if each.error is not None:
                raise each.error
            with self._client.translated_errors(server, each.connection):
                head = each.connection.response()
            answer = self.read(request.method, self._client.responded(server, each.connection, head), request.most)
        except StorageError as error:
            # The server may have closed a kept connection meanwhile, and others with it.
            if not each.was_kept or not error.lost or request.method == "MOVE":
                raise self._client.explained(server, error) from error.__cause__
            self._client.close_idle(server)
            return self._alone(request)
        return self._alone(request) if answer.response.status in REDIRECTS else answer

    @staticmethod
    def read(method: str, response: HttpResponse, most: int) -> GroupAnswer:
        """A response with its body; the connection of a longer one is closed."""
        body = b""
        while chunk := response.read():
            body += chunk
            if len(body) > most:
                response.finish()
                break
        return GroupAnswer(method, response, body)


def of_one(act: Callable[[], _T], otherwise: _T) -> _T:
    """The result of a request; ``otherwise`` after an error that says nothing about other requests.

    Raises:
        StorageError: other requests would fail as well.
    """
    try:
        return act()
    except StorageError as error:
        if error.is_of_server:
            raise
        return otherwise
