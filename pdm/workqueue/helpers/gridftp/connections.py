"""Pool of control connections, kept from batch to batch.

One for each server, and pairs for transfers between two servers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import unquote_to_bytes

from pdm.workqueue.helpers.gridftp import protection
from pdm.workqueue.helpers.gridftp.control import LOGIN_S, ControlChannel
from pdm.workqueue.helpers.gridftp.event_loop import Channel
from pdm.workqueue.helpers.gridftp.gsi import Gsi
from pdm.workqueue.helpers.gridftp.replies import Reply
from pdm.workqueue.helpers.gridftp.reply_reader import ChannelError, SilentServerError

#: Seconds for which a server that lacks a feature is not tried again.
_UNFIT_S = 30.0
#: Facts that listings and MLST request; for names of owners, servers ask their account database at each entry.
FACTS = b"OPTS MLST Type;Size;Modify;UNIX.mode;UNIX.uid;UNIX.gid;UNIX.slink;X.count;"
FACTS_WITH_OWNERS = FACTS + b"UNIX.owner;UNIX.group;"
#: Seconds between performance markers of a large transfer, the servers' default.
_MARKERS_EVERY_S = 5
#: Data connections of a large file, and the round trip in seconds from which a server gets that many.
_STREAMS_FAR_AWAY, _FAR_AWAY_S = 4, 0.02


class ChannelPool:
    """Opens, keeps and drops channels. Used by one thread; `interrupt` may be called from any thread.

    Args:
        gsi: the library and the credential.

    Attributes:
        login_s: timeout of each step of a login, in seconds.
        entry_counts: number of entries of a directory when it was last listed for a copy, by address and path.
    """

    def __init__(self, gsi: Gsi) -> None:
        self._gsi = gsi
        self.login_s = LOGIN_S
        self.entry_counts: dict[tuple[str, bytes], int] = {}
        self._single: dict[str, ControlChannel] = {}
        self._pairs: dict[tuple[str, str, int], tuple[ControlChannel, ControlChannel]] = {}
        self._unfit: dict[str, float] = {}
        self._guard = threading.Lock()
        self._opening: set[ControlChannel] = set()

    def single(self, address: str, *, again: bool = False, plain: bool = False) -> ControlChannel:
        """A channel to a server, for all commands but transfers.

        Args:
            address: ``host:port``.
            again: whether to try a server, too, that could not be used shortly before.
            plain: whether it is plain FTP, without a login.

        Raises:
            ChannelError: it cannot be opened.
        """
        # A channel for transfers is free, too: batches run one after the other.
        for (source, destination, _), (at_source, at_destination) in self._pairs.items():
            for known, channel in ((source, at_source), (destination, at_destination)):
                if known == address and not channel.is_dead:
                    return channel
        return self.beside(address, again=again, plain=plain)

    def beside(self, address: str, *, again: bool = False, plain: bool = False) -> ControlChannel:
        """Like `single`, but not a channel for transfers: to be used during a transfer."""
        kept = self._single.get(address)
        if kept is not None:
            if not kept.is_dead:
                return kept
            self.drop(kept)
        with self._opened(address, again=again, plain=plain) as (opened,):
            self._single[address] = opened
        return opened

    def pair(
        self, source: str, destination: str, *, large: bool = False, again: bool = False
    ) -> tuple[ControlChannel, ControlChannel]:
        """Channels to two servers that are ready for transfers from one to the other.

        Their data connections are kept: each RETR belongs to the STOR that was sent at the same time.

        Args:
            source: ``host:port`` of the server that sends.
            destination: ``host:port`` of the server that receives.
            large: whether the files are large enough for several data connections, if the servers are far away.
            again: whether to try servers, too, that could not be used shortly before.

        Raises:
            ChannelError: they cannot be opened.
        """
        for streams in (_STREAMS_FAR_AWAY, 1) if large else (1,):
            pair = self._pairs.get((source, destination, streams))
            if pair is None or streams < _streams(pair, large=large):
                continue
            if not any(channel.is_dead for channel in pair):
                with contextlib.suppress(ChannelError):
                    _set_markers(pair[1], wanted=large)
                    return pair
            self.drop(*pair)
        spare = {address: channel for address in (source, destination) if (channel := self._spare(address)) is not None}
        try:
            return self._paired(source, destination, spare, large=large, again=again)
        except ChannelError as error:
            if not spare or error.refused:
                raise
        # The server may have closed the kept channels.
        return self._paired(source, destination, {}, large=large, again=True)

    def _spare(self, address: str) -> ControlChannel | None:
        channel = self._single.pop(address, None)
        # A server that has sent to us, or received, fails at the first transfer of another kind.
        if channel is not None and (channel.is_dead or channel.data_port.kept is not None):
            channel.dispose()
            return None
        return channel

    def _paired(
        self, source: str, destination: str, spare: Mapping[str, ControlChannel], *, large: bool, again: bool
    ) -> tuple[ControlChannel, ControlChannel]:
        """A pair of new channels and unpaired kept ones."""
        missing = [address for address in (source, destination) if address not in spare]
        if source == destination and spare:
            missing = [destination]
        with self._opened(*missing, again=again, known=tuple(spare.values())) as opened:
            new = iter(opened)
            at_source = spare[source] if source in spare else next(new)
            at_destination = spare[destination] if destination in spare and source != destination else next(new)
            try:
                streams = _prepare_transfers(at_source, at_destination, large=large)
            except ChannelError:
                self._unfit[source] = self._unfit[destination] = time.monotonic() + _UNFIT_S
                raise
        self._pairs[source, destination, streams] = (at_source, at_destination)
        return at_source, at_destination

    def drop(self, *channels: Channel) -> None:
        """Close channels, each with the other one of its pair."""
        for key, pair in list(self._pairs.items()):
            if any(channel in pair for channel in channels):
                del self._pairs[key]
                channels = (*channels, *pair)
        for address, single in list(self._single.items()):
            if single in channels:
                del self._single[address]
        for channel in set(channels):
            channel.dispose()

    def drop_all(self) -> None:
        """Close all channels: the state of their commands is unknown."""
        self.drop(*self._single.values(), *(channel for pair in self._pairs.values() for channel in pair))

    def interrupt(self) -> None:
        """Interrupt running logins."""
        with self._guard:
            for channel in self._opening:
                channel.close()

    @contextlib.contextmanager
    def _opened(
        self, *addresses: str, again: bool = False, plain: bool = False, known: Sequence[ControlChannel] = ()
    ) -> Iterator[list[ControlChannel]]:
        """New channels; their logins run in parallel, because each takes a tenth of a second of the server's time.

        They and the kept ones can be interrupted until this returns; if it fails, all are closed.
        """
        channels = [ControlChannel(None if plain else self._gsi, address, self.login_s) for address in addresses]
        with self._guard:
            self._opening.update(channels, known)
        try:
            for address in addresses:
                if not again and self._unfit.get(address, 0.0) > time.monotonic():
                    raise ChannelError(f"{address} could not be used shortly before", address, refused=True)
            if channels:
                self._log_in(channels)
            yield channels
        except BaseException:
            for channel in (*channels, *known):
                channel.dispose()
            raise
        finally:
            with self._guard:
                self._opening.clear()

    def _log_in(self, channels: Sequence[ControlChannel]) -> None:
        errors: list[ChannelError] = []

        def open_one(channel: ControlChannel) -> None:
            try:
                channel.open()
                if "MLST" in channel.features:
                    _accepted(channel, FACTS)
            except SilentServerError as error:
                # No more is known about it.
                errors.insert(0, error)
            except ChannelError as error:
                self._unfit[channel.address] = time.monotonic() + _UNFIT_S
                errors.append(error)

        threads = [threading.Thread(target=open_one, args=(channel,), name="login") for channel in channels[1:]]
        for thread in threads:
            thread.start()
        open_one(channels[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _prepare_transfers(at_source: ControlChannel, at_destination: ControlChannel, *, large: bool) -> int:
    """Configure two servers for transfers; returns the number of data connections."""
    pair = (at_source, at_destination)
    if any(channel.data_port.encrypts for channel in pair):
        _protect(pair)
    for channel in pair:
        _accepted(channel, b"TYPE I")
        _accepted(channel, b"MODE E")
        channel.data_port.mode = b"E"
    _set_markers(at_destination, wanted=large)
    streams = _streams(pair, large=large)
    _accepted(at_source, b"OPTS RETR Parallelism=%d,%d,%d;" % (streams, streams, streams))
    try:
        _join(at_source, at_destination)
    except _EncryptionError:
        _protect(pair)
        _join(at_source, at_destination)
    return streams


class _EncryptionError(ChannelError):
    """A server makes no data connections that are not encrypted."""


def _join(at_source: ControlChannel, at_destination: ControlChannel) -> None:
    """Tell the source where the destination listens."""
    listens_at = _accepted(at_destination, b"PASV").data_address
    if listens_at is None:
        address = at_destination.address
        raise ChannelError(f"{address} returns no data address", address, refused=True)
    _accepted(at_source, b"PORT " + listens_at[0])


def _protect(pair: Sequence[ControlChannel]) -> None:
    """Have two servers encrypt their data connections: both do, or none."""
    for channel in pair:
        if not channel.data_port.encrypts:
            for command in protection.COMMANDS:
                _accepted(channel, command)
            channel.data_port.encrypts = True


def _set_markers(at_destination: ControlChannel, *, wanted: bool) -> None:
    """Turn the destination's performance markers on or off: for a small file they are 13 of 20 lines."""
    if at_destination.sends_markers is not wanted:
        for command in (b"TREV PERF %d", b"TREV RESTART %d"):
            # A server that does not know the option keeps its default.
            at_destination.ask(command % (_MARKERS_EVERY_S if wanted else 0))
        at_destination.sends_markers = wanted


def _streams(pair: tuple[ControlChannel, ControlChannel], *, large: bool) -> int:
    """Number of data connections: a single one is limited by its TCP window on a long path."""
    return max(map(streams_to, pair)) if large else 1


def streams_to(channel: ControlChannel) -> int:
    """Number of data connections of a large file to or from a server."""
    return _STREAMS_FAR_AWAY if _FAR_AWAY_S < channel.round_trip_s < float("inf") else 1


def _accepted(channel: ControlChannel, command: bytes) -> Reply:
    reply = channel.ask(command)
    if not reply.good:
        why = f"{channel.address} does not know {command.decode('ascii')}:\n{reply.text}"
        kind = _EncryptionError if protection.requires_encryption(reply) else ChannelError
        raise kind(why, channel.address, refused=not reply.closes)
    return reply


def host_port(url: str) -> str:
    """``host:port`` of a storage URL."""
    return url.split("/", 3)[2].rpartition("@")[2]


def server_path(url: str) -> bytes:
    """The path of a storage URL as its server expects it; ``/~`` stands for the account's home."""
    path = unquote_to_bytes("/" + url.split("/", 3)[3])
    return path[1:] if path.startswith(b"/~") else path


def fits_on_command_line(path: bytes) -> bool:
    """Whether a path can be part of a command, which is one line."""
    return b"\n" not in path and b"\r" not in path and b"\0" not in path


def parent_path(path: bytes) -> bytes:
    """The parent directory of a path; the root is its own parent."""
    head, _, _ = path.rstrip(b"/").rpartition(b"/")
    if head:
        return head
    return b"/" if path.startswith(b"/") else b"~"
