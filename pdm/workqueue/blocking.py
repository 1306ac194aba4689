"""The client for scripts and notebooks that have no reactor.

For example::

    with BlockingWorkqueueClient.from_environment() as client:
        names = [entry.name for entry in client.ls("cern", "/data/run7")]
        client.copy("cern", "/data/run7/", "ral", "/archive/run7/", wait=True)

A process has one Twisted reactor, which can run once. The first blocking client starts it in a thread, which serves all
blocking clients until the interpreter exits. A reactor that is running already is used, in whichever thread. Calls from
the reactor's own thread raise an error, because they would deadlock. A ``fork`` does not copy the thread: create the
client in the process that uses it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.python.threadable import isInIOThread

from pdm.workqueue.client.settings import ClientSettings
from pdm.workqueue.telemetry.clocks import use_monotonic_clock
from pdm.workqueue.WorkqueueClient import WorkqueueClient

_P = ParamSpec("_P")
_T = TypeVar("_T")
_START_S = 30.0


class _ReactorThread:
    """Runs Twisted's reactor in a thread, unless it runs already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def reactor(self) -> Any:
        """The running reactor; the first call starts it."""
        # Imported late, because the import installs a reactor.
        from twisted.internet import reactor  # noqa: TID251 - there is no caller that could pass it in

        running: Any = reactor
        with self._lock:
            if not running.running:
                self._start(running)
        return running

    def call(self, function: Callable[[], Deferred[_T]]) -> _T:
        """Call a function in the reactor's thread and wait for its result; KeyboardInterrupt cancels it."""
        reactor = self.reactor()
        if isInIOThread():
            raise RuntimeError("a blocking call in the reactor's own thread would deadlock: use WorkqueueClient there")
        future: Future[_T] = Future()
        begun: list[Deferred[_T]] = []

        def cancel() -> None:
            for deferred in begun:
                deferred.cancel()

        def begin() -> None:
            try:
                begun.append(function())
            except Exception as error:
                future.set_exception(error)
            else:
                begun[0].addCallbacks(future.set_result, failed)

        def failed(failure: Failure) -> None:
            future.set_exception(failure.value or RuntimeError("unknown failure"))

        reactor.callFromThread(begin)
        try:
            return future.result()
        except KeyboardInterrupt:
            reactor.callFromThread(cancel)
            raise

    def _start(self, reactor: Any) -> None:
        started = threading.Event()
        use_monotonic_clock(reactor)
        reactor.callWhenRunning(started.set)
        thread = threading.Thread(
            target=reactor.run, kwargs={"installSignalHandlers": False}, name="pdm-reactor", daemon=True
        )
        thread.start()
        if not started.wait(_START_S):
            raise RuntimeError("Twisted's reactor could not be started")

        def stop() -> None:
            reactor.callFromThread(reactor.stop)
            thread.join(_START_S)

        atexit.register(stop)


_THREAD = _ReactorThread()


def _blocking(
    method: Callable[Concatenate[WorkqueueClient, _P], Deferred[_T]],
) -> Callable[Concatenate[BlockingWorkqueueClient, _P], _T]:
    """A method of the client that waits for its result."""

    @wraps(method)
    def waiting(self: BlockingWorkqueueClient, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return _THREAD.call(lambda: method(self.client, *args, **kwargs))

    return waiting


def _iterating(
    method: Callable[Concatenate[WorkqueueClient, _P], AsyncIterator[_T]],
) -> Callable[Concatenate[BlockingWorkqueueClient, _P], Iterator[_T]]:
    """An iterating method of the client that waits for each item."""

    @wraps(method)
    def iterating(self: BlockingWorkqueueClient, /, *args: _P.args, **kwargs: _P.kwargs) -> Iterator[_T]:
        each = method(self.client, *args, **kwargs)

        async def following() -> _T | None:
            # Not anext(each, None): it mistakes a tuple that a Deferred returns for arguments.
            try:
                return await each.__anext__()
            except StopAsyncIteration:
                return None

        while (found := _THREAD.call(lambda: Deferred.fromCoroutine(following()))) is not None:
            yield found

    return iterating


class BlockingWorkqueueClient:
    """`WorkqueueClient` whose methods return values and raise errors; ^C stops waiting, but does not cancel the job.

    ``on_progress`` of `wait` is called in the reactor's thread.
    """

    def __init__(self, client: WorkqueueClient) -> None:
        self.client = client

    @classmethod
    def from_settings(cls, settings: ClientSettings) -> Self:
        """A client with explicit settings; see `WorkqueueClient.from_settings`."""
        return cls(WorkqueueClient.from_settings(_THREAD.reactor(), settings))

    @classmethod
    def from_environment(cls, url: str | None = None) -> Self:
        """A client with settings from the environment or client.conf; see `find_settings`."""
        return cls(WorkqueueClient.from_environment(_THREAD.reactor(), url))

    list = _blocking(WorkqueueClient.list)
    ls = _blocking(WorkqueueClient.ls)
    copy = _blocking(WorkqueueClient.copy)
    copy_items = _blocking(WorkqueueClient.copy_items)
    remove = _blocking(WorkqueueClient.remove)
    rename = _blocking(WorkqueueClient.rename)
    mkdir = _blocking(WorkqueueClient.mkdir)
    submit = _blocking(WorkqueueClient.submit)
    jobs = _blocking(WorkqueueClient.jobs)
    events_page = _blocking(WorkqueueClient.events_page)
    events = _iterating(WorkqueueClient.events)
    iterate_jobs = _iterating(WorkqueueClient.iterate_jobs)
    job = _blocking(WorkqueueClient.job)
    elements = _blocking(WorkqueueClient.elements)
    iterate_elements = _iterating(WorkqueueClient.iterate_elements)
    element = _blocking(WorkqueueClient.element)
    status = _blocking(WorkqueueClient.status)
    element_status = _blocking(WorkqueueClient.element_status)
    rate = _blocking(WorkqueueClient.rate)
    why = _blocking(WorkqueueClient.why)
    skipped = _blocking(WorkqueueClient.skipped)
    iterate_skipped = _iterating(WorkqueueClient.iterate_skipped)
    output = _blocking(WorkqueueClient.output)
    element_output = _blocking(WorkqueueClient.element_output)
    live_output = _blocking(WorkqueueClient.live_output)
    receipt = _blocking(WorkqueueClient.receipt)
    errors = _blocking(WorkqueueClient.errors)
    inspect_server = _blocking(WorkqueueClient.inspect_server)
    whoami = _blocking(WorkqueueClient.whoami)
    health = _blocking(WorkqueueClient.health)
    sites = _blocking(WorkqueueClient.sites)
    routes = _blocking(WorkqueueClient.routes)
    route_activity = _blocking(WorkqueueClient.route_activity)
    site_activity = _blocking(WorkqueueClient.site_activity)
    queue = _blocking(WorkqueueClient.queue)
    nodes = _blocking(WorkqueueClient.nodes)
    drain_node = _blocking(WorkqueueClient.drain_node)
    resume_node = _blocking(WorkqueueClient.resume_node)
    site = _blocking(WorkqueueClient.site)
    add_site = _blocking(WorkqueueClient.add_site)
    change_site = _blocking(WorkqueueClient.change_site)
    remove_site = _blocking(WorkqueueClient.remove_site)
    check_site = _blocking(WorkqueueClient.check_site)
    drain_site = _blocking(WorkqueueClient.drain_site)
    resume_site = _blocking(WorkqueueClient.resume_site)
    users = _blocking(WorkqueueClient.users)
    ban = _blocking(WorkqueueClient.ban)
    unban = _blocking(WorkqueueClient.unban)
    audit = _blocking(WorkqueueClient.audit)
    wait = _blocking(WorkqueueClient.wait)
    cancel = _blocking(WorkqueueClient.cancel)
    retry = _blocking(WorkqueueClient.retry)
    hold = _blocking(WorkqueueClient.hold)
    resume = _blocking(WorkqueueClient.resume)
    change_job = _blocking(WorkqueueClient.change_job)
    schedules = _blocking(WorkqueueClient.schedules)
    schedule = _blocking(WorkqueueClient.schedule)
    add_schedule = _blocking(WorkqueueClient.add_schedule)
    edit_schedule = _blocking(WorkqueueClient.edit_schedule)
    pause_schedule = _blocking(WorkqueueClient.pause_schedule)
    resume_schedule = _blocking(WorkqueueClient.resume_schedule)
    remove_schedule = _blocking(WorkqueueClient.remove_schedule)
    webhooks = _blocking(WorkqueueClient.webhooks)
    webhook = _blocking(WorkqueueClient.webhook)
    add_webhook = _blocking(WorkqueueClient.add_webhook)
    test_webhook = _blocking(WorkqueueClient.test_webhook)
    remove_webhook = _blocking(WorkqueueClient.remove_webhook)
    mail = _blocking(WorkqueueClient.mail)
    set_mail = _blocking(WorkqueueClient.set_mail)
    confirm_mail = _blocking(WorkqueueClient.confirm_mail)
    stop_mail = _blocking(WorkqueueClient.stop_mail)
    delegation = _blocking(WorkqueueClient.delegation)
    delegate = _blocking(WorkqueueClient.delegate)
    undelegate = _blocking(WorkqueueClient.undelegate)
    credentials = _blocking(WorkqueueClient.credentials)
    remove_credential = _blocking(WorkqueueClient.remove_credential)
    ssh_key = _blocking(WorkqueueClient.ssh_key)
    token = _blocking(WorkqueueClient.token)
    s3_key = _blocking(WorkqueueClient.s3_key)
    session = _blocking(WorkqueueClient.session)
    logins = _blocking(WorkqueueClient.logins)
    begin_login = _blocking(WorkqueueClient.begin_login)
    login_state = _blocking(WorkqueueClient.login_state)
    continue_login = _blocking(WorkqueueClient.continue_login)
    put_refresh_token = _blocking(WorkqueueClient.put_refresh_token)
    log_out = _blocking(WorkqueueClient.log_out)
    log_on = _blocking(WorkqueueClient.log_on)
    log_off = _blocking(WorkqueueClient.log_off)
    close = _blocking(WorkqueueClient.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
