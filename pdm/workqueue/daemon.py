"""``twistd pdmworkqueue``: reads the configuration, starts the assembled parts, stops them in order."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.failure import Failure

from pdm.workqueue.config.reading import ConfigError, read
from pdm.workqueue.config.settings import Settings
from pdm.workqueue.services import OrderedServices
from pdm.workqueue.telemetry.logging import capture_stdlib, log_observer

if TYPE_CHECKING:
    from pdm.workqueue.assembly import Assembly

_log = Logger()


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
        # out. The lock in the state folder guards what must be guarded: the instance.
        if self.parent is not None and self.parent.get("pidfile") == "twistd.pid":
            self.parent["pidfile"] = ""


def makeService(options: Options) -> OrderedServices:
    """What twistd runs.

    Raises:
        SystemExit: the configuration is wrong, or was only to be checked.
    """
    # These import SQLAlchemy, OpenSSL and more: "twistd --help" must not wait for them.
    from twisted.internet import reactor

    from pdm.workqueue.assembly import EXPECTED, Assembly
    from pdm.workqueue.startup_checks import problems

    try:
        settings = read(Path(options["config"]))
        found = problems(settings, database=bool(options["check-config"]))
        if found:
            for problem in found:
                _tell_operator(problem)
            raise SystemExit(1)
        if options["check-config"]:
            sys.stdout.write(f"{options['config']}: the configuration is good\n")
            raise SystemExit(0)
        daemon = Daemon(reactor, settings, EXPECTED)
        daemon.assembly = Assembly(reactor, settings, daemon)
    except ConfigError as error:
        _tell_operator(str(error))
        raise SystemExit(1) from None
    except EXPECTED as error:
        _tell_operator(f"cannot start: {error}")
        raise SystemExit(1) from None
    return daemon


class Daemon(OrderedServices):
    """The parts under twistd: its log, its signals, its ready line, its exit status."""

    assembly: Assembly

    def __init__(self, reactor: Any, settings: Settings, expected: tuple[type[Exception], ...]) -> None:
        super().__init__(self._ready, self._failed)
        self._reactor = reactor
        self._settings = settings
        self._expected = expected
        self._observer = log_observer(settings.logs)

    def setServiceParent(self, parent: Any) -> None:
        super().setServiceParent(parent)
        # twistd asks the application for its observer before it begins to log.
        parent.setComponent(ILogObserver, self._observer)

    def startService(self) -> None:
        capture_stdlib(self._settings.logs.level)
        # Threads, locks and sockets belong to the process that stays: twistd may fork before the reactor runs.
        self._reactor.callWhenRunning(self._start_in_reactor)

    def _start_in_reactor(self) -> None:
        gc.collect()
        # Threads that compute let the reactor wait for so long each time it wants to go on.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        # After the reactor has set its own: with those, a clean stop would look like a death by signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._reactor.callFromThread(self._stop_reactor))
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self.assembly.reload))
        super().startService()

    def stopService(self) -> Deferred[None]:
        _log.info("stopping")
        return super().stopService()

    def _ready(self) -> None:
        # What the modules and the start have made stays for good. To walk through it again and again, looking for
        # garbage, would hold up the reactor for a tenth of a second each time.
        gc.collect()
        gc.freeze()
        self.assembly.lag.start()
        _log.info("ready {url}", url=self.assembly.url)
        # Not sys.stdout: twistd has made that a part of its log.
        if sys.__stdout__ is not None:
            sys.__stdout__.write(f"pdmworkqueue ready {self.assembly.url}\n")
            sys.__stdout__.flush()

    def _failed(self, failure: Failure) -> None:
        if failure.check(*self._expected):
            _tell_operator(f"cannot start: {failure.value}")
        else:
            _log.failure("the daemon could not start", failure)
            _tell_operator(f"cannot start: {failure.type.__name__ if failure.type else ''}: {failure.value}")
        # twistd would end with status 0.
        self._reactor.addSystemEventTrigger("after", "shutdown", _leave_with_failure)
        self._stop_reactor()

    def _stop_reactor(self) -> None:
        if self._reactor.running:
            self._reactor.stop()


def _tell_operator(message: str) -> None:
    """One line on standard error, whatever twistd has made of sys.stderr."""
    if sys.__stderr__ is not None:
        sys.__stderr__.write(f"pdmworkqueue: {' '.join(message.split())}\n")
        sys.__stderr__.flush()


def _leave_with_failure() -> None:
    os._exit(1)
