"""TLS between the nodes of a service: each shows its host certificate, and recognises those of the others.

Nodes connect to the port of the users, so an authority of nodes must be among those of ``[tls] trust``, too;
``[node] peers_trust`` says which of these may vouch for a node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from twisted.logger import Logger
from twisted.web.iweb import IPolicyForHTTPS

from pdm.workqueue.certificates.names import dn, host_names
from pdm.workqueue.certificates.pem import CertificateFilesError
from pdm.workqueue.certificates.proxies import is_proxy
from pdm.workqueue.certificates.tls_client import node_policy
from pdm.workqueue.certificates.tls_server import ServerTls, verified_chain
from pdm.workqueue.certificates.trust import Trust, file_state, read_trust
from pdm.workqueue.certificates.verification import UNREADABLE
from pdm.workqueue.domain.signing_policy import PolicyMode

_log = Logger()


class NodeTls:
    """What a node needs for TLS with other nodes.

    Args:
        tls: has this node's certificate, and the authorities of ``[tls] trust``.
        trust: PEM file or grid-style directory of ``[node] peers_trust``; None for those of ``[tls] trust``.

    Raises:
        CertificateFilesError: `trust` is unfit, or has an authority that ``[tls] trust`` does not have.
    """

    def __init__(self, tls: ServerTls, trust: Path | None, signing: PolicyMode) -> None:
        self._tls = tls
        self._path = trust
        self._signing = signing
        self._state: tuple[object, ...] = ()
        self._own: Trust | None = None
        if trust is not None:
            self._state, self._own = file_state(trust), self._read(trust)
        self._policy: IPolicyForHTTPS | None = None
        self._made_of: tuple[object, ...] = ()

    @property
    def trust(self) -> Trust:
        """The authorities that may vouch for nodes."""
        return self._tls.trust if self._own is None else self._own

    def policy(self) -> IPolicyForHTTPS:
        """How this node connects to others; a new object after a change of certificates."""
        made_of = (self._tls.identity, self.trust)
        if self._policy is None or self._made_of != made_of:
            self._policy, self._made_of = node_policy(self.trust, self._tls.identity), made_of
        return self._policy

    def hosts_of(self, transport: Any) -> frozenset[str]:
        """The hosts that a peer's certificate is for, if an authority of nodes vouches for it.

        Returns:
            Host names in lower case and addresses; empty for a proxy, for a chain that leads elsewhere or that is
            revoked, and without a certificate.
        """
        chain, trust = verified_chain(transport), self.trust
        try:
            if not chain or is_proxy(chain[0]) or chain[-1] not in trust.authorities:
                return frozenset()
            if self._tls.trust.revoked(chain) is not None or trust.check_signatures(chain).refusal is not None:
                return frozenset()
            return frozenset(name.lower() for name in host_names(chain[0]))
        except UNREADABLE:
            return frozenset()

    async def refresh_if_changed(
        self, in_thread: Callable[[Callable[[], Trust | None]], Awaitable[Trust | None]]
    ) -> None:
        """Read the authorities again if a file has changed; unfit files are logged, and change nothing."""
        if self._path is None:
            return
        try:
            self._own = await in_thread(self._read_if_changed) or self._own
        except CertificateFilesError as error:
            _log.error("authorities of nodes not taken, the former stay in force: {error}", error=str(error))

    def _read_if_changed(self) -> Trust | None:
        assert self._path is not None
        state = file_state(self._path)
        if state == self._state:
            return None
        trust = self._read(self._path)
        self._state = state
        return trust

    def _read(self, path: Path) -> Trust:
        trust = read_trust(path, "off", self._signing)
        unknown = [dn(each.subject) for each in trust.authorities if each not in self._tls.trust.authorities]
        if unknown:
            raise CertificateFilesError(
                f"{path} ([node] peers_trust): {unknown[0]} is not among the authorities of [tls] trust: add it there,"
                " because nodes connect to the port of the users"
            )
        return trust
