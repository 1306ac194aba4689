"""Fetches a proxy from a MyProxy server, with the program ``myproxy-logon`` in a process of its own.

The password goes through a pipe to the program's standard input and nowhere else; the proxy comes back through another
pipe, so that neither is ever in a file, in arguments or in an environment.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.error import ProcessDone
from twisted.internet.interfaces import IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from pdm.workqueue.certificates.pem import FetchedProxy, ProxyBundleError, read_bundle

PROGRAM = "myproxy-logon"
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
#: Seconds after which the program is killed.
TIMEOUT_S = 30.0
#: Logons at once, of all users: each is a process, and a server that hangs must not fill the machine with them. Of a
#: user one at a time, so that one user at a slow server does not block the others.
_AT_ONCE = 4
_MOST_BYTES = 256 * 1024
_LONGEST_WORDS = 300
#: Characters of output that are read: servers may be hostile, and the patterns take quadratic time.
_MOST_READ = 4000


class MyProxyError(Exception):
    """No proxy was fetched; the text says why, and never holds the password."""


class WrongPasswordError(MyProxyError):
    """The server refuses the password of a user it knows."""


class NoSuchUserError(MyProxyError):
    """The server holds nothing under this name."""


class LogonRefusedError(MyProxyError):
    """The server refused for an unknown reason; the password may be wrong."""


class LogonUnderWayError(MyProxyError):
    """Another logon of the user is running."""


#: Pattern in the program's output → error and its text.
_ERROR_PATTERNS: Sequence[tuple[re.Pattern[str], type[MyProxyError], str]] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, text)
    for pattern, kind, text in (
        (
            r"bad password|invalid (?:credential )?pass|passphrase must be at least|verification failed",
            WrongPasswordError,
            "the MyProxy server does not accept this password",
        ),
        (r"no credentials exist", NoSuchUserError, "the MyProxy server holds no credential under this user name"),
        (
            r"credentials? .*expired|expired credential",
            MyProxyError,
            "the credential at the MyProxy server has expired",
        ),
        (
            r"certificate verify failed|untrusted self-signed|trusted CA certificate|could not verify credential"
            r"|name of the remote|authorization.*denied|server identity|does not match",
            MyProxyError,
            "the certificate of the MyProxy server is not trusted: an operator has to install its authority",
        ),
        (
            r"unable to connect|unknown host|connection refused|timed out|no route|unreachable|reset by peer",
            MyProxyError,
            "the MyProxy server cannot be reached",
        ),
    )
)


@frozen(eq=False)
class MyProxyLogons:
    """Fetches proxies, a few at a time.

    Attributes:
        trust_dir: hashed directory of the authorities that vouch for MyProxy servers.
        trust: makes the directory with a site's own authorities in it, too.
    """

    reactor: Any
    trust_dir: Path
    timeout_s: float = TIMEOUT_S
    trust: Callable[[Path | None, Collection[str]], Awaitable[Path]] | None = None
    _busy: set[int] = field(factory=set)
    _turns: DeferredSemaphore = field(factory=lambda: DeferredSemaphore(_AT_ONCE))

    async def fetch_for(
        self, user_id: int, server: str, username: str, password: str, lifetime_s: int, authorities: str = ""
    ) -> FetchedProxy:
        """Log on for a user of the service, once at a time.

        Args:
            server: ``HOST:PORT``.
            password: used once, kept nowhere.
            lifetime_s: for how long the proxy is to be valid.
            authorities: PEM of authorities that are trusted besides, for this server only.

        Raises:
            MyProxyError: in words why not.
        """
        if user_id in self._busy:
            raise LogonUnderWayError("you are logging on already: wait for that")
        self._busy.add(user_id)
        try:
            trust_dir = self.trust_dir
            if authorities and self.trust is not None:
                trust_dir = await self.trust(self.trust_dir, [authorities])
            return await self.fetch(server, username, password, lifetime_s, trust_dir)
        finally:
            self._busy.discard(user_id)

    async def fetch(
        self, server: str, username: str, password: str, lifetime_s: int, trust_dir: Path | None = None
    ) -> FetchedProxy:
        """Log on.

        Args:
            server: ``HOST:PORT``.
            password: used once, kept nowhere.
            lifetime_s: for how long the proxy is to be valid; the server may give less, and counts in hours.

        Raises:
            MyProxyError: in words why not.
        """
        program = shutil.which(PROGRAM, path=SEARCH_PATH)
        if program is None:
            raise MyProxyError(f"the program {PROGRAM} is not installed at the service: tell an operator")
        host, _, port = server.rpartition(":")
        hours = max(math.ceil(lifetime_s / 3600), 1)
        arguments = [
            PROGRAM,
            "-S",
            "-q",
            "-s",
            host.strip("[]"),
            "-p",
            port,
            "-l",
            username,
            "-t",
            str(hours),
            "-o",
            "-",
        ]
        # No X509_USER_PROXY, and a home without certificates: the logon shows no certificate of the service.
        environment = {
            "PATH": SEARCH_PATH,
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "X509_CERT_DIR": str(trust_dir or self.trust_dir),
            "X509_USER_PROXY": "/nonexistent/proxy",
        }
        await self._turns.acquire()
        try:
            logon = _Logon(self.reactor, password.encode() + b"\n", self.timeout_s)
            process: IReactorProcess = self.reactor
            process.spawnProcess(logon, program, arguments, environment, path="/", childFDs={0: "w", 1: "r", 2: "r"})
            bundle = await logon.finished
        finally:
            self._turns.release()
        try:
            return read_bundle(bundle)
        except ProxyBundleError as error:
            raise MyProxyError(f"the MyProxy server gave no usable proxy: {error}") from error


class _Logon(ProcessProtocol):
    """One run of the program.

    Attributes:
        finished: fires with what it printed; fails with `MyProxyError`. Cancelling it kills the program.
    """

    def __init__(self, reactor: IReactorTime, secret: bytes, timeout_s: float) -> None:
        self._secret = secret
        self._printed: dict[int, list[bytes]] = {1: [], 2: []}
        self._left = _MOST_BYTES
        self._timed_out = False
        self._timer = reactor.callLater(timeout_s, self._too_late)
        self.finished: Deferred[bytes] = Deferred(lambda _: self._kill())

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(self._secret)
        self.transport.closeStdin()
        self._secret = b""

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._left -= len(data)
        if self._left >= 0:
            self._printed[childFD].append(data)
        else:
            self._kill()

    def processEnded(self, reason: Failure) -> None:
        if self._timer.active():
            self._timer.cancel()
        if self.finished.called:
            return
        if reason.check(ProcessDone) and self._left >= 0:
            self.finished.callback(b"".join(self._printed[1]))
        elif self._timed_out:
            self.finished.errback(MyProxyError("the MyProxy server did not answer in time"))
        else:
            self.finished.errback(_error_for(b"".join(self._printed[2]).decode("utf-8", "replace")))

    def _too_late(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        if self.transport is not None and self.transport.pid is not None:
            self.transport.signalProcess("KILL")


def _error_for(said: str) -> MyProxyError:
    said = said[:_MOST_READ]
    for pattern, kind, text in _ERROR_PATTERNS:
        if pattern.search(said):
            return kind(text)
    words = " ".join("".join(c if c.isprintable() else " " for c in said).split())
    return LogonRefusedError(f"the MyProxy server gave no proxy: {words[:_LONGEST_WORDS] or 'it did not say why'}")
