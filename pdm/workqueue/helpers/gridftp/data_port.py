"""What a control channel and its server have agreed upon for their data connections."""

from __future__ import annotations

import socket
from typing import Protocol

from pdm.workqueue.helpers.gridftp.data_address import passive_command


class DataConnections(Protocol):
    """Data connections of a channel."""

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed one of them."""

    def close(self) -> None: ...


class DataPort:
    """The settings of data connections.

    Attributes:
        mode: transmission mode that was last set: ``S`` (stream) or ``E`` (extended blocks).
        authenticates: whether both ends log in, as servers with proxies do by default (DCAU).
        encrypts: whether both ends encrypt the bytes (PROT P): only if the server requires it.
        kept: connections for further transfers; closed together with the channel.
        local_host: our address, as the server's network sees it unless it is translated.
        peer_host: the server's address.
    """

    def __init__(self) -> None:
        self.mode = b"S"
        self.authenticates = False
        self.encrypts = False
        self.kept: DataConnections | None = None
        self.local_host = self.peer_host = ""

    def connected(self, control: socket.socket, *, authenticates: bool) -> None:
        """The control channel is open."""
        self.local_host, self.peer_host = str(control.getsockname()[0]), str(control.getpeername()[0])
        self.authenticates = authenticates

    @property
    def is_dead(self) -> bool:
        """Whether the server has closed a connection that was kept: it fails at the next transfer."""
        return self.kept is not None and self.kept.is_dead

    @property
    def passive_command(self) -> bytes:
        """The command that makes the server listen."""
        return passive_command(self.peer_host)

    def keep(self, connections: DataConnections | None) -> None:
        """Keep connections, and close those before; the server must have dropped its ends (PASV, PORT)."""
        before, self.kept = self.kept, connections
        if before is not None:
            before.close()
