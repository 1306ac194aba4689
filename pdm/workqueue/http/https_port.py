"""A port of the service: TLS with client certificates and proxies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define
from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IProtocolFactory
from twisted.logger import Logger

from pdm.workqueue.http.request import ApiSite

_log = Logger()
_BACKLOG = 1024


def listening_url(scheme: str, port: Any) -> str:
    """The URL of a port that listens: scheme, host and number."""
    address = port.getHost()
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{scheme}://{host}:{address.port}"


@define(eq=False, kw_only=True)
class HttpsPort:
    """Serves one API.

    Attributes:
        what: the API, for the log.
        port: its number; 0 for any that is free, None to serve nothing.
        make_site: makes the site to listen with.
        wrap: adds TLS.
        site: that listens; None before the start.
        url: where it listens; empty if it does not.
    """

    reactor: Any
    what: str
    host: str
    port: int | None
    make_site: Callable[[Any], ApiSite]
    wrap: Callable[[Any], IProtocolFactory]
    site: ApiSite | None = None
    url: str = ""
    _listening: Any = None

    def start(self) -> None:
        """Listen, if a port is configured.

        Raises:
            CannotListenError: the port cannot be used.
        """
        if self.port is None:
            return
        self.site = self.make_site(self.reactor)
        self._listening = self.reactor.listenTCP(self.port, self.wrap(self.site), _BACKLOG, self.host)
        self.url = listening_url("https", self._listening)
        _log.info("{what} is served at {url}", what=self.what, url=self.url)

    async def stop(self) -> None:
        if self._listening is not None:
            await maybeDeferred(self._listening.stopListening)
