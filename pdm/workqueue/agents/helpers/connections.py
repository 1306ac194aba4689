"""The control channels of a helper, kept from batch to batch: one for each server, pairs for transfers between two."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import unquote_to_bytes

from pdm.workqueue.agents.helpers.control_channel import LOGIN_S, ChannelError, ControlChannel, Reply, SilentServerError
from pdm.workqueue.agents.helpers.gsi import Gsi
from pdm.workqueue.agents.helpers.pipeline import Channel

#: Seconds for which a server that does not fit is not tried again.
_UNFIT_S = 30.0
#: What listings and looks shall tell.
_FACTS = b"OPTS MLST Type;Size;Modify;UNIX.mode;UNIX.slink;X.count;"
#: The server is about to close the connection.
_CLOSING = 421
#: Data connections of a large file between servers of which one answers later than that.
_STREAMS_FAR_AWAY, _FAR_AWAY_S = 4, 0.02
_PASSIVE = re.compile(r"227 [^\n]{0,200}?((?:\d{1,3},){5}\d{1,3})")


class Connections:
    """Opens, keeps and drops channels. Used by one thread; `interrupt` by any.

    Args:
        gsi: the library and the credential.

    Attributes:
        login_s: seconds that each step of a login may take.
    """

    def __init__(self, gsi: Gsi) -> None:
        self._gsi = gsi
        self.login_s = LOGIN_S
        self._single: dict[str, ControlChannel] = {}
        self._pairs: dict[tuple[str, str, int], tuple[ControlChannel, ControlChannel]] = {}
        self._unfit: dict[str, float] = {}
        self._guard = threading.Lock()
        self._opening: set[ControlChannel] = set()

    def single(self, place: str, *, again: bool = False, plain: bool = False) -> ControlChannel:
        """A channel to a server, for all but transfers.

        Args:
            place: ``host:port``.
            again: whether to try also a server that could not be used just now.
            plain: whether it lets everybody in.

        Raises:
            ChannelError: there is none to be had.
        """
        # One that serves transfers does as well: batches come one after the other.
        for (source, destination, _), (at_source, at_destination) in self._pairs.items():
            for known, channel in ((source, at_source), (destination, at_destination)):
                if known == place and not channel.is_dead:
                    return channel
        return self.beside(place, again=again, plain=plain)

    def beside(self, place: str, *, again: bool = False, plain: bool = False) -> ControlChannel:
        """The same, but none that serves transfers: of use while such a one does."""
        kept = self._single.get(place)
        if kept is not None:
            if not kept.is_dead:
                return kept
            self.drop(kept)
        with self._opened(place, again=again, plain=plain) as (opened,):
            self._single[place] = opened
        return opened

    def pair(
        self, source: str, destination: str, *, large: bool = False, again: bool = False
    ) -> tuple[ControlChannel, ControlChannel]:
        """Channels to two servers that are ready to send files from the one to the other.

        Their data connections are kept: each RETR goes with the STOR that was sent at the same time.

        Args:
            source: ``host:port`` of the server that sends.
            destination: of the one that receives.
            large: whether files are so large that several data connections are worth it, if the servers are far away.
            again: whether to try also servers that could not be used just now.

        Raises:
            ChannelError: there are none to be had.
        """
        for streams in (_STREAMS_FAR_AWAY, 1) if large else (1,):
            pair = self._pairs.get((source, destination, streams))
            if pair is None or streams < _streams(pair, large=large):
                continue
            if not any(channel.is_dead for channel in pair):
                return pair
            self.drop(*pair)
        spare = {place: channel for place in (source, destination) if (channel := self._spare(place)) is not None}
        try:
            return self._paired(source, destination, spare, large=large, again=again)
        except ChannelError as error:
            if not spare or error.refused:
                raise
        # It may be that the server had closed what we had kept.
        return self._paired(source, destination, {}, large=large, again=True)

    def _spare(self, place: str) -> ControlChannel | None:
        channel = self._single.pop(place, None)
        if channel is not None and channel.is_dead:
            channel.dispose()
            return None
        return channel

    def _paired(
        self, source: str, destination: str, spare: Mapping[str, ControlChannel], *, large: bool, again: bool
    ) -> tuple[ControlChannel, ControlChannel]:
        """A pair of new channels and of such as are to spare."""
        missing = [place for place in (source, destination) if place not in spare]
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
        """End channels, and with each the other one of its pair."""
        for key, pair in list(self._pairs.items()):
            if any(channel in pair for channel in channels):
                del self._pairs[key]
                channels = (*channels, *pair)
        for place, single in list(self._single.items()):
            if single in channels:
                del self._single[place]
        for channel in set(channels):
            channel.dispose()

    def drop_all(self) -> None:
        """End all channels: what is under way on them is not known."""
        self.drop(*self._single.values(), *(channel for pair in self._pairs.values() for channel in pair))

    def interrupt(self) -> None:
        """End the logins that are under way."""
        with self._guard:
            for channel in self._opening:
                channel.close()

    @contextlib.contextmanager
    def _opened(
        self, *places: str, again: bool = False, plain: bool = False, known: Sequence[ControlChannel] = ()
    ) -> Iterator[list[ControlChannel]]:
        """New channels, logged in side by side: a login is a tenth of a second of work for its server.

        Until this ends they, and those that were known, can be interrupted, and if it fails they are ended.
        """
        channels = [ControlChannel(None if plain else self._gsi, place, self.login_s) for place in places]
        with self._guard:
            self._opening.update(channels, known)
        try:
            for place in places:
                if not again and self._unfit.get(place, 0.0) > time.monotonic():
                    raise ChannelError(f"{place} could not be used just now", place, refused=True)
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
        troubles: list[ChannelError] = []

        def open_one(channel: ControlChannel) -> None:
            try:
                channel.open()
                if "MLST" in channel.features:
                    _accepted(channel, _FACTS)
            except SilentServerError as error:
                # That is all that can be known of it.
                troubles.insert(0, error)
            except ChannelError as error:
                self._unfit[channel.place] = time.monotonic() + _UNFIT_S
                troubles.append(error)

        threads = [threading.Thread(target=open_one, args=(channel,), name="login") for channel in channels[1:]]
        for thread in threads:
            thread.start()
        open_one(channels[0])
        for thread in threads:
            thread.join()
        if troubles:
            raise troubles[0]


def _prepare_transfers(at_source: ControlChannel, at_destination: ControlChannel, *, large: bool) -> int:
    """Have two servers ready for transfers; returns the number of data connections."""
    for channel in (at_source, at_destination):
        _accepted(channel, b"TYPE I")
        _accepted(channel, b"MODE E")
    streams = _streams((at_source, at_destination), large=large)
    _accepted(at_source, b"OPTS RETR Parallelism=%d,%d,%d;" % (streams, streams, streams))
    found = _PASSIVE.search(_accepted(at_destination, b"PASV").text)
    if found is None:
        place = at_destination.place
        raise ChannelError(f"{place} gives no address for data", place, refused=True)
    _accepted(at_source, b"PORT " + found.group(1).encode())
    return streams


def _streams(pair: tuple[ControlChannel, ControlChannel], *, large: bool) -> int:
    """Data connections between two servers: one alone is limited by its window, if its way is long."""
    is_far = max(channel.round_trip_s for channel in pair) > _FAR_AWAY_S
    return _STREAMS_FAR_AWAY if large and is_far else 1


def _accepted(channel: ControlChannel, command: bytes) -> Reply:
    reply = channel.ask(command)
    if not reply.good:
        why = f"{channel.place} does not know {command.decode('ascii')}:\n{reply.text}"
        raise ChannelError(why, channel.place, refused=reply.code != _CLOSING)
    return reply


def place_of(url: str) -> str:
    """``host:port`` of a storage URL."""
    return url.split("/", 3)[2].rpartition("@")[2]


def path_of(url: str) -> bytes:
    """The path of a storage URL as its server takes it; ``/~`` stands for the account's home."""
    path = unquote_to_bytes("/" + url.split("/", 3)[3])
    return path[1:] if path.startswith(b"/~") else path


def can_be_said(path: bytes) -> bool:
    """Whether a path can stand in a command, which is one line."""
    return not any(byte in path for byte in (b"\n", b"\r", b"\0"))


def parent_of(path: bytes) -> bytes:
    """The folder that holds the thing at a path; of the root, that is the root."""
    head, _, _ = path.rstrip(b"/").rpartition(b"/")
    if head:
        return head
    return b"/" if path.startswith(b"/") else b"~"
