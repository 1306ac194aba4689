"""Requests to the other nodes of the service: over TLS, bounded in time and memory, the answers kept for a second.

A node that is asked answers from its own memory and disk, and asks no other one. What it sends is validated like any
input. A node that does not answer is not asked again for a while, so that it delays few requests.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
from attrs import define, field, frozen
from twisted.internet.defer import CancelledError, Deferred, DeferredList, DeferredSemaphore
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, HTTPConnectionPool, ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from pdm.workqueue.certificates.tls_client import refusal_of
from pdm.workqueue.execution.bounded_connections import BoundedEndpoint, BoundedProtocol, ReceiveBudget, end_connections
from pdm.workqueue.store import nodes
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.nodes import NodeRecord
from pdm.workqueue.telemetry.background import following

#: Seconds for one question, from the connection to the last byte.
_TIMEOUT_S = 2.0
#: Seconds for which answers, and the list of nodes, are kept.
_KEPT_S = 1.0
#: Seconds for which a node that did not answer is not asked again.
_NOT_ASKED_S = 3.0
#: Questions to one node at a time.
_AT_ONCE = 4
#: Answers that are kept, and bytes of one that may be kept.
_MOST_KEPT, _LARGEST_KEPT = 64, 512 * 1024
#: Bytes of status and headers of an answer, at most.
_HEADER_BYTES = 64 * 1024

_T = TypeVar("_T")
_log = Logger()


@frozen
class _Outcome:
    """What came of a coroutine for which several wait."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def _started(coroutine: Coroutine[Deferred[Any], Any, Any]) -> Deferred[_Outcome]:
    """Run a coroutine in the background: those who wait for it (`following`) may leave without ending it."""

    async def run() -> _Outcome:
        try:
            return _Outcome(await coroutine)
        except Exception as error:
            return _Outcome(error=error)

    return Deferred.fromCoroutine(run())


class PeerSilentError(Exception):
    """A node cannot be asked, or its answer is of no use. The text is for users: it names the node and no more."""

    def __init__(self, node: str, why: str = "which does not answer") -> None:
        super().__init__(f"on node {node}, {why}")
        self.node = node


class _UselessAnswerError(Exception):
    """A node has answered with something else than was asked for."""


@define(eq=False)
class _Link:
    """The connections to one node.

    Attributes:
        budget: of all these connections together.
        opened: those that are open.
        asked: number of questions under way.
        expected: bytes that these may be answered with.
        is_silent: whether it has not answered the last question.
        silent_until: it is not asked before this time; then with one question.
    """

    budget: ReceiveBudget
    pool: HTTPConnectionPool
    agent: Any
    policy: IPolicyForHTTPS
    slots: DeferredSemaphore
    opened: set[BoundedProtocol]
    answered_at: float = 0.0
    asked: int = 0
    expected: int = 0
    is_silent: bool = False
    silent_until: float = 0.0

    def begin(self, most: int) -> None:
        """A question is sent, whose answer has so many bytes at most."""
        self.asked += 1
        self.expected += most
        self.budget.left += most

    def end(self, most: int) -> None:
        self.asked -= 1
        self.expected -= most
        # What was not used of one answer is not for the next.
        allowed = self.expected + _HEADER_BYTES
        self.budget.left = min(self.budget.left, allowed) if self.asked else allowed


@define(eq=False, kw_only=True)
class Peers:
    """The other nodes that use the database.

    Attributes:
        incarnation: of this node.
        policy: how it speaks TLS to others; another object when its certificates have changed.
        root: common prefix of the paths of the API.
        timeout_s: for one question, from the connection to the last byte.
    """

    reactor: Any
    database: Database
    incarnation: str
    policy: Callable[[], IPolicyForHTTPS]
    root: str
    timeout_s: float = _TIMEOUT_S
    _nodes: tuple[float, Sequence[NodeRecord]] | None = None
    _reading: Deferred[_Outcome] | None = None
    _links: dict[str, _Link] = field(factory=dict)
    #: Incarnation and path → when it was answered, and the answer.
    _answers: OrderedDict[tuple[str, str], tuple[float, Any]] = field(factory=OrderedDict)
    _asking: dict[tuple[str, str], Deferred[_Outcome]] = field(factory=dict)

    async def stop(self) -> None:
        """End all connections."""
        for link in self._links.values():
            await link.pool.closeCachedConnections()
            end_connections(link.opened)
        self._links.clear()

    # -- which nodes there are

    async def nodes(self) -> Sequence[NodeRecord]:
        """All nodes, this one too; none where the database is of one daemon. At most a second old."""
        if not self.database.is_shared:
            return ()
        if self._nodes is not None and self.reactor.seconds() - self._nodes[0] < _KEPT_S:
            return self._nodes[1]
        reading = self._reading
        if reading is None:
            reading = self._reading = _started(self._read_nodes())
            # It may have ended already: a database that is away refuses at once.
            reading.addCallback(self._read)
        found: Sequence[NodeRecord] = (await following(reading)).get()
        return found

    async def others(self) -> Sequence[NodeRecord]:
        """All nodes but this one."""
        return [node for node in await self.nodes() if node.incarnation != self.incarnation]

    async def is_node(self, hosts: Collection[str]) -> bool:
        """Whether one of some host names, in lower case, is that of a node's address."""
        return any(host_of(node.address) in hosts for node in await self.nodes() if node.address)

    def forget_nodes(self) -> None:
        """Read the list of nodes again when it is needed: one has come, gone or changed."""
        self._nodes = None

    async def _read_nodes(self) -> Sequence[NodeRecord]:
        began = self.reactor.seconds()
        found = await self.database.read("list nodes", nodes.live_nodes)
        self._nodes = (began, found)
        for gone in self._links.keys() - {node.worker for node in found}:
            self._links.pop(gone).pool.closeCachedConnections()
        return found

    def _read(self, outcome: _Outcome) -> _Outcome:
        self._reading = None
        return outcome

    # -- questions

    async def ask(
        self, node: NodeRecord, path: str, answer: type[_T], most: int, query: Mapping[str, str] | None = None
    ) -> _T:
        """Ask a node, unless the same was answered less than a second ago.

        Args:
            path: below the root of the API.
            answer: type of the JSON.
            most: bytes of it.

        Raises:
            PeerSilentError: it does not answer in time, or not as it should; the log says why.
        """
        target = self.root + path + (f"?{urlencode(query)}" if query else "")
        key = (node.incarnation, target)
        known = self._answers.get(key)
        if known is not None and self.reactor.seconds() - known[0] < _KEPT_S:
            found: _T = known[1]
            return found
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = _started(self._ask(node, target, answer, most))
            asking.addCallback(self._answered, key, most)
        result: _T = (await following(asking)).get()
        return result

    async def ask_all(
        self, asked: Sequence[NodeRecord], path: str, answer: type[_T], most: int
    ) -> tuple[Sequence[tuple[NodeRecord, _T]], Mapping[str, PeerSilentError]]:
        """Ask several nodes at the same time; see `ask`.

        Returns:
            Nodes with their answers, and worker → why there is none.
        """
        asking = [Deferred.fromCoroutine(self.ask(node, path, answer, most)) for node in asked]
        answers: list[tuple[NodeRecord, _T]] = []
        silent: dict[str, PeerSilentError] = {}
        found: Any = await DeferredList(asking, consumeErrors=True)
        for node, (succeeded, result) in zip(asked, found, strict=True):
            if succeeded:
                answers.append((node, result))
            else:
                result.trap(PeerSilentError)
                silent[node.worker] = result.value
        return answers, silent

    def _answered(self, outcome: _Outcome, key: tuple[str, str], most: int) -> _Outcome:
        self._asking.pop(key, None)
        if outcome.error is None and most <= _LARGEST_KEPT:
            self._answers[key] = (self.reactor.seconds(), outcome.value)
            self._answers.move_to_end(key)
            if len(self._answers) > _MOST_KEPT:
                self._answers.popitem(last=False)
        return outcome

    async def _ask(self, node: NodeRecord, target: str, answer: type[_T], most: int) -> _T:
        if not node.address:
            raise PeerSilentError(node.name, "which has no address for other nodes")
        link = self._link(node)
        if link.is_silent and (self.reactor.seconds() < link.silent_until or link.asked):
            raise PeerSilentError(node.name)
        began = self.reactor.seconds()
        exchange = Deferred.fromCoroutine(self._exchange(link, node.address, target, answer, most + _HEADER_BYTES))
        timer = self.reactor.callLater(self.timeout_s, exchange.cancel)
        try:
            result = await exchange
        except Exception as error:
            if not link.asked:
                # Connections that were given up may never end by themselves.
                end_connections(link.opened)
            if link.answered_at < began:
                # Else only this question takes the node long.
                self._note_silence(link, node, self._words(error, link))
            raise PeerSilentError(node.name) from error
        finally:
            if timer.active():
                timer.cancel()
        link.answered_at = self.reactor.seconds()
        if link.is_silent:
            link.is_silent = False
            _log.info("node {node} answers again", node=node.name)
        return result

    async def _exchange(self, link: _Link, address: str, target: str, answer: type[_T], most: int) -> _T:
        await link.slots.acquire()
        link.begin(most)
        try:
            url = address.rstrip("/") + target
            response: Any = await link.agent.request(b"GET", url.encode("ascii"), _HEADERS)
            body = _Body()
            response.deliverBody(body)
            content = await body.complete
            if response.code != 200:
                raise _UselessAnswerError(f"it answers with status {response.code}")
            return msgspec.json.decode(content, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _UselessAnswerError(f"what it sends is not understood ({error})") from error
        finally:
            link.end(most)
            link.slots.release()

    def _link(self, node: NodeRecord) -> _Link:
        policy = self.policy()
        link = self._links.get(node.worker)
        if link is None or link.policy is not policy:
            budget = ReceiveBudget(_HEADER_BYTES)
            pool = HTTPConnectionPool(self.reactor)
            pool.maxPersistentPerHost = _AT_ONCE
            opened: set[BoundedProtocol] = set()
            endpoints = _Endpoints(self.reactor, policy, budget, opened, self.timeout_s)
            agent = Agent.usingEndpointFactory(self.reactor, endpoints, pool)
            if link is not None:
                link.pool.closeCachedConnections()
            link = self._links[node.worker] = _Link(budget, pool, agent, policy, DeferredSemaphore(_AT_ONCE), opened)
        return link

    def _note_silence(self, link: _Link, node: NodeRecord, why: str) -> None:
        link.silent_until = self.reactor.seconds() + _NOT_ASKED_S
        if not link.is_silent:
            link.is_silent = True
            _log.warn(
                "node {node} at {address} does not answer: {why}; what it runs is shown without progress and logs",
                node=node.name,
                address=node.address,
                why=why,
            )

    def _words(self, error: Exception, link: _Link) -> str:
        if isinstance(error, CancelledError):
            return f"nothing complete came within {self.timeout_s:g} s"
        if isinstance(error, _UselessAnswerError):
            return str(error)
        refusal = refusal_of(Failure(error), link.policy)
        if refusal is not None:
            return refusal.what
        causes = [str(each.value) for each in getattr(error, "reasons", ()) or ()]
        return f"{type(error).__name__}: {'; '.join(causes) or error}"[:500]


class _Body(Protocol):
    """The body of an answer; its size is bounded by the connection."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self.complete: Deferred[bytes] = Deferred(lambda _: self._close())

    def dataReceived(self, data: bytes) -> None:
        self._chunks.append(data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if self.complete.called:
            return
        if reason.check(ResponseDone):
            self.complete.callback(b"".join(self._chunks))
        else:
            self.complete.errback(reason)

    def _close(self) -> None:
        transport: Any = self.transport
        transport.loseConnection()


_HEADERS = Headers({"Accept": ["application/json"]})


def host_of(address: str | None) -> str:
    """The host of a URL as certificates have it: a name in lower case, or an address; empty for none."""
    try:
        host = urlsplit(address or "").hostname or ""
    except ValueError:
        return ""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


@implementer(IAgentEndpointFactory)
@frozen
class _Endpoints:
    """Makes the connections to one node; they share a budget."""

    _reactor: Any
    _tls: IPolicyForHTTPS
    _budget: ReceiveBudget
    _opened: set[BoundedProtocol]
    _timeout_s: float

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        host = uri.host.decode("ascii").removeprefix("[").removesuffix("]")
        endpoint = HostnameEndpoint(self._reactor, host, uri.port, timeout=self._timeout_s)
        secured = wrapClientTLS(self._tls.creatorForNetloc(host.encode("ascii"), uri.port), endpoint)
        bounded: IStreamClientEndpoint = BoundedEndpoint(secured, lambda: self._budget, self._opened)
        return bounded
