"""``twistd pdmworkqueue``: reads the configuration, starts the assembled parts, stops them in order."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.failure import Failure

from pdm.workqueue import __version__
from pdm.workqueue.config.reader import ConfigError, read_settings
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.installation import explain_missing
from pdm.workqueue.services import OrderedServices, ServiceManager
from pdm.workqueue.telemetry.clocks import use_monotonic_clock
from pdm.workqueue.telemetry.logging import capture_stdlib, log_observer

if TYPE_CHECKING:
    from pdm.workqueue.assembly import Assembly

_log = Logger()


#: After the database was given up, a stop that has not ended within so many seconds is forced.
_FORCED_STOP_S = 10.0
#: prctl(2)
_PR_SET_DUMPABLE = 4
#: A tenth of what Python has by default.
_SWITCH_INTERVAL_S = 0.0005


class Options(usage.Options):
    """Options of ``twistd pdmworkqueue``."""

    longdesc = "Serves the PDM workqueue: lists, copies, removes, renames and makes directories at storage sites."
    optParameters = [  # noqa: N815, RUF012 - the name and shape that usage.Options reads
        ["config", "c", "/etc/pdm/workqueue.conf", "The configuration file."],
    ]
    optFlags = [["check-config", None, "Check the configuration and exit."]]  # noqa: N815, RUF012

    def postOptions(self) -> None:
        # twistd would write twistd.pid into the working directory, and two daemons there would shut each other
        # out. The lock in the state directory guards what must be guarded: the instance.
        if self.parent is not None and self.parent.get("pidfile") == "twistd.pid":
            self.parent["pidfile"] = ""


def makeService(options: Options) -> OrderedServices:
    """What twistd runs.

    Raises:
        SystemExit: the configuration is wrong, or was only to be checked.
    """
    # Until the reactor installs its own handlers there is nothing to stop.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _leave_no_core()
    try:
        # Before the imports: a wrong setting is reported at once.
        settings = read_settings(Path(options["config"]))
    except ConfigError as error:
        _tell_operator(str(error))
        raise SystemExit(1) from None
    # Imports make almost no garbage, and each full collection would scan all that they have made: a third of the CPU
    # time of a start, and as much again when the process exits.
    gc.disable()
    # These import SQLAlchemy, OpenSSL and more: "twistd --help" must not wait for them.
    from twisted.internet import reactor

    try:
        from pdm.workqueue.admin.checks import Level, find_problems
        from pdm.workqueue.assembly import EXPECTED_ERRORS, Assembly
    except ModuleNotFoundError as error:
        if (missing := explain_missing(error)) is None:
            raise
        _tell_operator(f"cannot start: {missing}")
        raise SystemExit(1) from None

    gc.freeze()
    gc.enable()
    use_monotonic_clock(reactor)
    try:
        if options["check-config"]:
            from pdm.workqueue.admin.examination import examine

            results = [each for each in examine(settings) if each.level is not Level.GOOD]
            for each in results:
                _tell_operator(each.line if each.level is Level.ERROR else f"warning: {each.line}")
            if any(each.level is Level.ERROR for each in results):
                raise SystemExit(1)
            sys.stdout.write(f"{options['config']}: the configuration is good\n")
            raise SystemExit(0)
        found = find_problems(settings)
        if found:
            for problem in found:
                _tell_operator(problem)
            raise SystemExit(1)
        daemon = Daemon(reactor, settings, EXPECTED_ERRORS)
        daemon.assembly = Assembly(reactor=reactor, settings=settings, services=daemon)
    except ConfigError as error:
        _tell_operator(str(error))
        raise SystemExit(1) from None
    except EXPECTED_ERRORS as error:
        _tell_operator(f"cannot start: {error}")
        raise SystemExit(1) from None
    return daemon


def _leave_no_core() -> None:
    """Disable core dumps of this process and its helpers: their memory holds keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        # The limit does not apply to a core_pattern that pipes to a program.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


class Daemon(OrderedServices):
    """The parts under twistd: its log, its signals, its ready line, its exit status."""

    assembly: Assembly

    def __init__(self, reactor: Any, settings: Settings, expected: tuple[type[Exception], ...]) -> None:
        super().__init__(self._ready, self._failed)
        self._reactor = reactor
        self._settings = settings
        self._expected = expected
        self._stopping = False
        self._node = settings.node.name or socket.gethostname()
        self._observer = log_observer(settings.logs, self._node)
        self._manager = ServiceManager(reactor, os.environ, os.getpid())

    def setServiceParent(self, parent: Any) -> None:
        super().setServiceParent(parent)
        # twistd asks the application for its observer before it begins to log.
        parent.setComponent(ILogObserver, self._observer)

    def startService(self) -> None:
        capture_stdlib(self._settings.logs.level)
        # Threads, locks and sockets belong to the process that stays: twistd may fork before the reactor runs.
        self._reactor.callWhenRunning(self._start_in_reactor)
        # A signal that arrives between the reactor's handlers and ours stops the reactor, too.
        self._reactor.addSystemEventTrigger("after", "shutdown", self._forget_signal)

    def _forget_signal(self) -> None:
        # twistd would end by that signal.
        self._reactor._exitSignal = None

    def _start_in_reactor(self) -> None:
        # After the reactor has installed its own: with those, a clean stop would exit with the signal's status.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._reactor.callFromThread(self._stop_reactor))
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reload))
        signal.signal(signal.SIGUSR1, lambda *_: self._reactor.callFromThread(self._reopen_log))
        self._manager.start()
        _log.info(
            "PDM Workqueue {version} starts: configuration {configuration}, node {node}, database {database}",
            version=__version__,
            configuration=str(self._settings.source),
            node=self._node,
            database=self._settings.database.url,
        )
        gc.collect()
        # The longest time for which a computing thread keeps the interpreter lock from the reactor.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        super().startService()

    def _reload(self) -> None:
        self._manager.reloading()
        _log.info("SIGHUP: the sites and the TLS files are read again; other settings need a restart")
        self.assembly.reload()
        self._manager.reloaded()

    def _reopen_log(self) -> None:
        # Each line looks whether the file has been renamed; so does this one.
        _log.info("SIGUSR1: the log continues in a new file if it has been rotated")

    def stopService(self) -> Deferred[None]:
        began = self._reactor.seconds()
        running = self.assembly.executor.running_counts
        _log.info(
            "stopping: {batches} batches with {attempts} attempts run, {unsettled} results are not in the database yet",
            batches=running[0],
            attempts=running[1],
            unsettled=self.assembly.executor.context.settler.backlog,
        )
        self._manager.stopping()
        timeout_s = self._settings.database.stop_timeout_s
        timers = [
            self._reactor.callLater(timeout_s, self.assembly.give_up),
            self._reactor.callLater(timeout_s + _FORCED_STOP_S, self._cut_off),
        ]

        def ended(result: Any) -> Any:
            for timer in timers:
                if timer.active():
                    timer.cancel()
            self._manager.stop()
            ended = self.assembly.executor.context.settler.counts
            _log.info(
                "stopped after {seconds:.1f} s: since its start {done} attempts were done, {failed} failed,"
                " {bytes} bytes",
                seconds=self._reactor.seconds() - began,
                done=ended.number(done=True),
                failed=ended.number(done=False),
                bytes=sum(ended.bytes.values()),
            )
            return result

        return super().stopService().addBoth(ended)

    def _cut_off(self) -> None:
        _log.error("the stop does not end; the process exits now")
        _leave_with_failure()

    def _ready(self) -> None:
        # Objects made by imports and the start live for ever: each full collection would scan them, and block the
        # reactor for a tenth of a second.
        gc.collect()
        gc.freeze()
        self.assembly.lag.start()
        _log.info(
            "ready {url}: version {version}, node {node}, {count} sites",
            url=self.assembly.server.api_port.url,
            version=__version__,
            node=self._node,
            count=len(self.assembly.sites.all()),
        )
        self._manager.ready(self._status)
        # Not sys.stdout: twistd has made that a part of its log.
        if sys.__stdout__ is not None:
            sys.__stdout__.write(f"pdmworkqueue ready {self.assembly.server.api_port.url}\n")
            sys.__stdout__.flush()

    def _status(self) -> str:
        faults = self.assembly.service_health.faults
        reasons = "; ".join(f"{fault.part.value} do not work: {fault.reason}" for fault in faults)
        return f"serves {self.assembly.server.api_port.url}" + (f"; {reasons}" if reasons else "")

    def _failed(self, failure: Failure) -> None:
        if self._stopping:
            _log.info("the start was broken off: {why}", why=failure.getErrorMessage())
            return
        if failure.check(*self._expected):
            _tell_operator(f"cannot start: {failure.value}")
        else:
            _log.failure("the daemon could not start", failure)
            _tell_operator(f"cannot start: {failure.type.__name__ if failure.type else ''}: {failure.value}")
        # twistd would end with status 0.
        self._reactor.addSystemEventTrigger("after", "shutdown", _leave_with_failure)
        self._stop_reactor()

    def _stop_reactor(self) -> None:
        if self._stopping:
            _log.info("stopping already; SIGKILL ends what does not wait")
        elif self._reactor.running:
            self._stopping = True
            self._reactor.stop()


def _tell_operator(message: str) -> None:
    """One line on standard error, whatever twistd has made of sys.stderr."""
    if sys.__stderr__ is not None:
        sys.__stderr__.write(f"pdmworkqueue: {' '.join(message.split())}\n")
        sys.__stderr__.flush()


def _leave_with_failure() -> None:
    os._exit(1)
