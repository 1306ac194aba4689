"""The port of the door: TLS with client certificates and proxies, as the port of the service's own API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define
from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IProtocolFactory
from twisted.logger import Logger

from pdm.workqueue.config.settings import FtsSettings
from pdm.workqueue.http.request import ApiSite

_log = Logger()
_BACKLOG = 1024


@define(eq=False, kw_only=True)
class FtsPort:
    """Serves FTS3's REST API.

    Attributes:
        make_site: makes the site to listen with.
        wrap: adds TLS.
        url: where it listens; empty if it does not.
    """

    reactor: Any
    settings: FtsSettings
    make_site: Callable[[Any], ApiSite]
    wrap: Callable[[Any], IProtocolFactory]
    url: str = ""
    _port: Any = None

    def start(self) -> None:
        """Listen, if a port is configured.

        Raises:
            CannotListenError: the port cannot be used.
        """
        if not self.settings.port:
            return
        factory = self.wrap(self.make_site(self.reactor))
        self._port = self.reactor.listenTCP(self.settings.port, factory, _BACKLOG, self.settings.host)
        address = self._port.getHost()
        host = f"[{address.host}]" if ":" in address.host else address.host
        self.url = f"https://{host}:{address.port}"
        _log.info("clients of FTS are served at {url}", url=self.url)

    async def stop(self) -> None:
        if self._port is not None:
            await maybeDeferred(self._port.stopListening)
