"""Progress and logs of what all nodes of the service run: this node's own, and what the others say of theirs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from attrs import define, field, frozen

from pdm.workqueue.domain.jobs import JobRecord, LogSpan
from pdm.workqueue.domain.progress import Moving
from pdm.workqueue.execution.peers import Peers, PeerSilentError
from pdm.workqueue.execution.progress_board import ElementProgress, JobHistory, JobMotion, ProgressBoard
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.reader import LogMissingError, LogPiece, LogTail
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.store import node_work
from pdm.workqueue.store.nodes import NodeRecord
from pdm.workqueue.wire.peers import (
    MOST_ELEMENTS,
    MOST_JOBS,
    ElementMotionView,
    HistoryView,
    LogPartView,
    MotionView,
    NodeProgressView,
)

#: Bytes of answers: progress of all jobs, of some elements, of a history.
_PROGRESS_BYTES, _ELEMENTS_BYTES, _HISTORY_BYTES = 512 * 1024, 64 * 1024, 128 * 1024
#: Bytes that JSON needs at most for a byte of a log: what is no UTF-8 becomes a character of three bytes.
_JSON_FACTOR = 3
#: Lines and notes beyond the bounds of a log or piece.
_LOG_MARGIN_BYTES = 1024**2
#: Seconds for which the workers of a job are remembered.
_KEPT_S = 1.0
#: Jobs whose shown progress is remembered, so that it does not go back.
_MOST_SHOWN = 10_000


@frozen
class ClusterMotion:
    """What moves of a job in all nodes.

    Attributes:
        moving: None if nothing of it is known to run, or to have run recently.
        silent: where parts of it run that do not answer: ``on node X, which does not answer``; also on a node whose
            lease has ended, until its elements are released.
    """

    moving: Moving | None
    silent: Sequence[str] = ()


@frozen
class ElementMotion:
    """Progress of an element that runs; `silent` says where it does if that node does not answer."""

    progress: ElementProgress | None = None
    silent: str | None = None


@define(eq=False, kw_only=True)
class ClusterProgress:
    """Progress of what all nodes run; `board` has that of this node."""

    board: ProgressBoard
    peers: Peers
    #: Job → when the workers that run elements of it were read, and their names.
    _workers: dict[int, tuple[float, Mapping[str, str]]] = field(factory=dict)
    #: Job → starts of nodes with their losses, and the bytes that were shown.
    _shown: OrderedDict[int, tuple[frozenset[tuple[str, int]], int]] = field(factory=OrderedDict)

    async def of_job(self, job: JobRecord) -> ClusterMotion:
        """What moves of a job; its own record tells whether any of it runs."""
        own = self.board.of_job(job.id, job.bytes_done)
        if not job.counters.running or not self.peers.database.is_shared:
            return ClusterMotion(own)
        answers, silent = await self._ask(await self.peers.others())
        motions = [
            (incarnation, motion) for incarnation, found in answers.items() if (motion := found.get(job.id)) is not None
        ]
        mine = self.board.motion_of(job.id)
        known = sum(motion.running for _, motion in motions) + (0 if mine is None else mine.running)
        away = await self._unknown(job.id, silent) if known < job.counters.running else ()
        if not motions:
            return ClusterMotion(own, away)
        if mine is not None:
            motions.append((self.peers.incarnation, motion_view(mine)))
        transferred = self._never_back(job, motions)
        rates = [motion.instant for _, motion in motions if motion.instant is not None]
        files = [motion.files_per_second for _, motion in motions if motion.files_per_second is not None]
        moving = Moving(transferred, sum(rates) if rates else None, sum(files) if files else None)
        return ClusterMotion(moving, away)

    async def _unknown(self, job_id: int, silent: Mapping[str, PeerSilentError]) -> Sequence[str]:
        """Where parts of a job run that no answer covers. ``silent``: worker → why it has not answered."""
        now = self.peers.reactor.seconds()
        read_at, workers = self._workers.get(job_id, (-_KEPT_S, {}))
        if now - read_at >= _KEPT_S:
            self._workers = {job: kept for job, kept in self._workers.items() if now - kept[0] < _KEPT_S}
            workers = await self.peers.database.read("find daemons of a job", node_work.workers_of_job, job_id)
            self._workers[job_id] = now, workers
        live = {node.worker for node in await self.peers.nodes()}
        return [
            str(silent[worker]) if worker in silent else str(PeerSilentError(name, "whose lease has ended"))
            for worker, name in workers.items()
            if worker in silent or worker not in live
        ]

    def _never_back(self, job: JobRecord, motions: Sequence[tuple[str, MotionView]]) -> int:
        """Bytes that have moved and are not proven; with the proven ones never less than before, unless some are lost.

        An element that has just ended is not among the moving ones any more, and not yet among the proven ones.
        """
        losses = frozenset((incarnation, motion.losses) for incarnation, motion in motions)
        known, before = self._shown.pop(job.id, (losses, 0))
        moved = job.bytes_done + sum(motion.moving for _, motion in motions)
        if known <= losses:
            moved = max(moved, before)
        self._shown[job.id] = (losses, moved)
        if len(self._shown) > _MOST_SHOWN:
            self._shown.popitem(last=False)
        return max(moved - job.bytes_done, 0)

    async def running(self) -> Sequence[int]:
        """Numbers of the jobs that have running elements in any node."""
        found = dict.fromkeys(self.board.running())
        if others := await self.peers.others():
            answers, silent = await self._ask(others)
            for motions in answers.values():
                found.update(dict.fromkeys(job_id for job_id, motion in motions.items() if motion.running))
            if silent:
                # What these run is shown without its progress, and it is said why.
                found.update(
                    dict.fromkeys(
                        await self.peers.database.read(
                            "find jobs of daemons", node_work.jobs_of_workers, list(silent), MOST_JOBS
                        )
                    )
                )
        return list(found)

    async def of_elements(self, job_id: int, elements: Iterable[int]) -> Mapping[int, ElementMotion]:
        """Progress of running elements of a job; nothing for those that no node runs."""
        found: dict[int, ElementMotion] = {}
        elsewhere = []
        for element in elements:
            own = self.board.of_element(job_id, element)
            if own is None:
                elsewhere.append(element)
            else:
                found[element] = ElementMotion(own)
        if not elsewhere or not (others := await self.peers.others()):
            return found
        workers = await self.peers.database.read(
            "find daemons of elements", node_work.workers_of_elements, job_id, elsewhere
        )
        for node in others:
            asked = [element for element in elsewhere if workers.get(element) == node.worker]
            for first in range(0, len(asked), MOST_ELEMENTS):
                part = asked[first : first + MOST_ELEMENTS]
                found.update(await self._elements_of(node, job_id, part))
        return found

    async def _elements_of(self, node: NodeRecord, job_id: int, elements: list[int]) -> dict[int, ElementMotion]:
        query = {"element": ",".join(map(str, elements))}
        path = f"/peers/jobs/{job_id}/elements"
        try:
            views = await self.peers.ask(node, path, list[ElementMotionView], _ELEMENTS_BYTES, query)
        except PeerSilentError as error:
            return {element: ElementMotion(silent=str(error)) for element in elements}
        return {
            view.element: ElementMotion(ElementProgress(view.transferred, view.instant, view.average, view.elapsed))
            for view in views
            if view.element in elements
        }

    async def histories_of(self, job_id: int) -> Sequence[HistoryView]:
        """What the nodes that answer have moved of a job over time, this one first."""
        own = self.board.history_of(job_id)
        found = [] if own is None else [history_view(own)]
        others = await self.peers.others()
        path = f"/peers/jobs/{job_id}/history"
        answers, _ = await self.peers.ask_all(others, path, list[HistoryView], _HISTORY_BYTES)
        return [*found, *(view for _, views in answers for view in views[:1])]

    async def _ask(
        self, others: Sequence[NodeRecord]
    ) -> tuple[Mapping[str, Mapping[int, MotionView]], Mapping[str, PeerSilentError]]:
        """Start of a node → job → what it moves of it; and the nodes that do not answer."""
        answers, silent = await self.peers.ask_all(others, "/peers/progress", NodeProgressView, _PROGRESS_BYTES)
        by_job = {node.incarnation: {motion.job: motion for motion in view.jobs} for node, view in answers}
        return by_job, silent


def motion_view(motion: JobMotion) -> MotionView:
    return MotionView(
        job=motion.job_id,
        running=motion.running,
        moving=max(motion.moving, 0),
        losses=motion.losses,
        instant=motion.instant,
        files_per_second=motion.files_per_second,
    )


def history_view(history: JobHistory) -> HistoryView:
    return HistoryView(
        begun_at=history.begun_at,
        bytes_column_s=history.bytes.column_s,
        bytes=history.bytes.rates(),
        files_column_s=history.files.column_s,
        files=history.files.rates(),
    )


class LogElsewhereError(Exception):
    """The log of an attempt is on a node that does not answer; the text says on which."""


@define(eq=False, kw_only=True)
class ClusterLogs:
    """Logs of attempts in any node: read from this node's directory, which several may share, else asked for.

    Attributes:
        worker: name of this daemon.
        most: bytes of a whole log.
    """

    store: LogStore
    peers: Peers
    worker: str
    most: int

    async def read(self, ref: LogRef, worker: str | None, span: LogSpan | None) -> str:
        """The text of a log that was written so far, bounded.

        Args:
            worker: name of the daemon that ran the attempt; None if it is not known.
            span: where the log is in the file, if known.

        Raises:
            LogMissingError: it is not on disk.
            LogElsewhereError: its node does not answer.
        """
        try:
            return await self.store.read(ref, worker, span)
        except LogMissingError as error:
            part = await self._part(error, ref, worker, span, self.most, {"part": "whole"})
            return part.text or ""

    async def read_piece(
        self, ref: LogRef, offset: int, most: int, worker: str | None, span: LogSpan | None
    ) -> LogPiece:
        """A piece of a log that may still grow; see `LogStore.read_piece`. Raises as `read`."""
        try:
            return await self.store.read_piece(ref, offset, most, worker, span)
        except LogMissingError as error:
            query = {"part": "piece", "offset": str(offset), "most": str(most)}
            part = await self._part(error, ref, worker, span, most, query)
            # What a reader has seen it does not get again, whatever the node says.
            return LogPiece(part.text, max(part.end, offset), part.is_last)

    async def read_tail(self, ref: LogRef, most: int, worker: str | None, span: LogSpan | None) -> LogTail:
        """The last lines of a log that may still grow, at most ``most`` bytes. Raises as `read`."""
        try:
            return await self.store.read_tail(ref, most, worker, span)
        except LogMissingError as error:
            part = await self._part(error, ref, worker, span, most, {"part": "tail", "most": str(most)})
            return LogTail(part.text or "", part.end, part.is_cut)

    async def _part(
        self,
        missing: LogMissingError,
        ref: LogRef,
        worker: str | None,
        span: LogSpan | None,
        most: int,
        query: dict[str, str],
    ) -> LogPartView:
        """A part of a log that is `missing` on this node's disk."""
        if worker is None or worker == self.worker or not self.peers.database.is_shared:
            raise missing
        node = next((node for node in await self.peers.others() if node.worker == worker), None)
        if node is None:
            name = await self.peers.database.read("find the name of a node", node_work.node_name, worker)
            raise LogElsewhereError(str(PeerSilentError(name)))
        if span is not None:
            query |= {"begin": str(span.offset), "length": str(span.length)}
        path = f"/peers/logs/{ref.log_uid}/{ref.element_id}/{ref.attempt}"
        try:
            part = await self.peers.ask(node, path, LogPartView, _JSON_FACTOR * most + _LOG_MARGIN_BYTES, query)
        except PeerSilentError as error:
            raise LogElsewhereError(str(error)) from error
        if not part.found:
            raise missing
        return part
