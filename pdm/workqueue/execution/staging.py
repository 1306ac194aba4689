"""What a visit of a wait does: staging files from tape to disk, and seeing that files arrive on tape.

A stage request is announced in the database before it is sent. If its answer is lost, with the connection or with the
daemon, the site may have the request or not, and cannot be asked, because its name is not known. So the files are
looked at after a while, and only those that are still on tape are requested again. A tape system joins requests for one
file, so that it is recalled once; the request without a name ends with the lifetime that it has asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from attrs import define, evolve, field
from twisted.logger import Logger

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope, Remedy
from pdm.workqueue.domain.holds import HOLDS, Wait, WaitingElement, WaitKind, WaitPhase, WaitPolicy
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.lifecycle import duration_s
from pdm.workqueue.domain.paths import InvalidPathError, StorageUrl
from pdm.workqueue.execution.tape import Action, TapeApis
from pdm.workqueue.execution.waits import SiteUnansweredError
from pdm.workqueue.sites.registry import Site, SiteRegistry
from pdm.workqueue.sites.storage_urls import storage_url
from pdm.workqueue.store import wait_visits
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.wait_visits import WaitVisit
from pdm.workqueue.wire.agent_events import TapeFile

_ON_DISK = frozenset({"DISK", "DISK_AND_TAPE"})
_ON_TAPE = frozenset({"TAPE", "DISK_AND_TAPE"})
#: Requests of which a site may not free the files at once are repeated so often; then their lifetime ends them.
_MOST_RELEASES = 8
#: Longest pause until elements are looked at whose files are on disk: their copies end by themselves.
_LONGEST_COPYING_S = 60.0
#: Words of error texts, and their meaning.
_ERRORS = (
    (("no such file", "not exist", "not found", "enoent"), FailureCode.NOT_FOUND),
    (("permission", "denied", "not authorized", "unauthorized", "forbidden"), FailureCode.PERMISSION_DENIED),
    (("lost",), FailureCode.LOST),
    (("unavailable", "offline"), FailureCode.UNAVAILABLE),
)
#: A request that fails with these as a whole is sent again.
_TEMPORARY = frozenset({Remedy.RETRY, Remedy.HOLD})


@define(kw_only=True)
class _Findings:
    """What a visit finds; becomes a `WaitVisit`."""

    wait: Wait
    resumed: set[int] = field(factory=set)
    ready: set[int] = field(factory=set)
    done: set[int] = field(factory=set)
    failed: dict[int, AttemptFailure] = field(factory=dict)
    left: set[int] = field(factory=set)
    dropped: set[int] = field(factory=set)
    #: Elements that no request is about, and those of them whose files are only on tape.
    located: set[int] = field(factory=set)
    on_tape: set[int] = field(factory=set)
    error: AttemptFailure | None = None

    @property
    def has_changed(self) -> bool:
        return bool(self.resumed or self.done or self.failed or self.left or self.dropped)


@define(eq=False, kw_only=True)
class TapeVisits:
    """Visits of waits for tape systems."""

    database: Database
    sites: SiteRegistry
    apis: TapeApis
    clock: Callable[[], datetime]
    policy: WaitPolicy
    _log: Logger = field(factory=Logger)

    async def look(self, wait: Wait, job: JobRecord, members: Sequence[WaitingElement]) -> WaitVisit:
        """Visit a wait.

        Raises:
            SiteUnansweredError: the site has said nothing about any of its elements.
        """
        site = self.sites.by_id(wait.site_id)
        found = _Findings(wait=wait)
        waiting = [one for one in members if one.waits_for(wait.kind)]
        ended = [one for one in members if one.status.is_final]
        if site is None:
            return self._without_site(found, waiting, ended)
        if wait.kind is WaitKind.ARCHIVE:
            found.left |= {one.id for one in members if not one.waits_for(wait.kind)}
        elif ended:
            await self._release(found, job, site, ended, is_all=len(ended) == len(members))
        if waiting and self.clock() >= wait.deadline:
            for one in waiting:
                hours = f"{wait.deadline:%Y-%m-%dT%H:%M:%SZ}"
                found.failed[one.id] = _failure(wait.kind, FailureCode.TAPE_TIMEOUT, f"not there by {hours}")
        elif waiting:
            try:
                await self._ask_about(found, job, site, waiting)
            except SiteUnansweredError as error:
                self._judge(found, waiting, error)
        return self._visit(found, len(waiting) - len(found.resumed) - len(found.failed) - len(found.done))

    def _without_site(
        self, found: _Findings, waiting: Sequence[WaitingElement], ended: Sequence[WaitingElement]
    ) -> WaitVisit:
        failure = AttemptFailure(FailureScope.SERVICE, FailureCode.UNSUPPORTED, "its site is not known any more")
        found.failed = {one.id: failure for one in waiting}
        found.left = {one.id for one in ended}
        return self._visit(found, 0)

    def _judge(self, found: _Findings, waiting: Sequence[WaitingElement], error: SiteUnansweredError) -> None:
        """A refusal of the whole request ends the elements; anything else is asked again."""
        failure, kind = error.failure, found.wait.kind
        if failure.code is FailureCode.NOT_FOUND:
            # Of the API, not of a file.
            failure = failure._replace(code=FailureCode.UNSUPPORTED)
        if failure.scope is FailureScope.TRANSFER:
            failure = failure._replace(scope=HOLDS[kind].scope)
        if failure.remedy in _TEMPORARY or found.has_changed:
            found.error = failure
        else:
            found.failed = {one.id: failure for one in waiting}

    def _visit(self, found: _Findings, left: int) -> WaitVisit:
        wait, now, error = found.wait, self.clock(), found.error
        if error is not None and not found.has_changed:
            raise SiteUnansweredError(error, wait=wait)
        # What is in no request is not withdrawn at the site.
        found.left |= found.failed.keys() & found.located
        polls = 0 if found.has_changed else wait.polls + 1
        pause_s = self.policy.pause_s(polls)
        if not left:
            # Only files of copies that run are looked at, which asks no site; and what has failed is withdrawn at once.
            pause_s = 0.0 if found.failed else min(pause_s, _LONGEST_COPYING_S)
        if error is not None:
            pause_s = max(pause_s, error.retry_after_s or 0.0)
        due_at = now + timedelta(seconds=pause_s)
        if left:
            due_at = min(due_at, max(wait.deadline, now))
        return WaitVisit(
            wait=evolve(wait, polls=polls, errors=wait.errors if error is not None else 0),
            due_at=due_at,
            resumed=found.resumed,
            ready=found.ready,
            done=found.done,
            failed=found.failed,
            left=found.left,
            dropped=found.dropped,
            polls_of_dropped=wait.polls + 2,
            message=None if error is None else f"{error.code}: {error.message}",
        )

    # -- asking

    async def _ask_about(self, found: _Findings, job: JobRecord, site: Site, waiting: Sequence[WaitingElement]) -> None:
        paths = self._paths(found, job, site, waiting)
        if not paths:
            return
        wait = found.wait
        if wait.kind is WaitKind.ARCHIVE:
            await self._locate(found, job, site, paths)
            return
        if wait.phase is WaitPhase.POLL and wait.request is not None:
            if await self._poll(found, job, site, paths):
                return
            # The site has forgotten the request.
            found.wait = evolve(wait, phase=WaitPhase.LOOK, request=None)
        await self._locate(found, job, site, paths)
        wanted = {number: path for number, path in paths.items() if number in found.on_tape}
        if not wanted:
            return
        await self._request(found, job, site, wanted)

    async def _request(self, found: _Findings, job: JobRecord, site: Site, wanted: dict[int, str]) -> None:
        if not await self.database.run("announce a stage request", wait_visits.begin_request, found.wait):
            raise SiteUnansweredError(
                AttemptFailure(FailureScope.SERVICE, FailureCode.INTERNAL, "another daemon has taken the turn")
            )
        asked = job.options.get("stage_lifetime")
        lifetime_s = self.policy.lifetime_s if asked is None else duration_s(asked)
        try:
            answer = await self.apis.ask(job.user_id, site, "stage", list(wanted.values()), lifetime_s=lifetime_s)
        except SiteUnansweredError as error:
            found.wait = evolve(found.wait, phase=WaitPhase.UNSURE if error.is_unsure else WaitPhase.ASK)
            raise
        found.wait = evolve(found.wait, phase=WaitPhase.POLL, request=answer.request)
        # A request is cancelled and released with the paths that it has: the others get a wait of their own.
        found.dropped |= found.located - wanted.keys() - found.resumed - found.failed.keys()
        self._log.info(
            "site {site} has accepted stage request {request} for {count} files",
            job=job.id,
            site=site.id,
            request=answer.request,
            count=len(wanted),
        )

    async def _poll(self, found: _Findings, job: JobRecord, site: Site, paths: dict[int, str]) -> bool:
        """Ask for the state of a request; False if the site does not know it."""
        numbers, request = list(paths), found.wait.request or ""
        try:
            answer = await self.apis.ask(job.user_id, site, "status", list(paths.values()), request=request)
        except SiteUnansweredError as error:
            if error.failure.code is FailureCode.NOT_FOUND:
                return False
            raise
        missing = dict(paths)
        for one in answer.files:
            number = _number(numbers, one)
            if number is None:
                continue
            missing.pop(number, None)
            if one.locality in _ON_DISK:
                found.resumed.add(number)
                found.ready.add(number)
            elif one.error:
                found.failed[number] = _failure_of_text(WaitKind.STAGE, one.error)
        if missing:
            # The site has dropped some of what it was asked for, or never took it.
            await self._locate(found, job, site, missing)
            found.dropped |= missing.keys() & found.on_tape
        return True

    async def _locate(self, found: _Findings, job: JobRecord, site: Site, paths: dict[int, str]) -> None:
        numbers, kind = list(paths), found.wait.kind
        found.located |= paths.keys()
        answer = await self.apis.ask(job.user_id, site, "archiveinfo", list(paths.values()))
        for one in answer.files:
            number = _number(numbers, one)
            if number is None:
                continue
            locality = one.locality.upper()
            if one.error:
                found.failed[number] = _failure_of_text(kind, one.error)
            elif locality in (_ON_DISK if kind is WaitKind.STAGE else _ON_TAPE):
                (found.resumed if kind is WaitKind.STAGE else found.done).add(number)
            elif locality == "LOST":
                found.failed[number] = _failure(kind, FailureCode.LOST, "the site says that it has lost the file")
            elif kind is WaitKind.STAGE and locality == "TAPE":
                found.on_tape.add(number)
            elif kind is WaitKind.STAGE and locality == "NONE":
                # It has no data on any medium, as an empty file: nothing to bring.
                found.resumed.add(number)

    async def _release(
        self, found: _Findings, job: JobRecord, site: Site, ended: Sequence[WaitingElement], *, is_all: bool
    ) -> None:
        """Let the site free the disk of files that are copied, and withdraw what was not on disk yet."""
        wait = found.wait
        if wait.request is None:
            found.left |= {one.id for one in ended}
            return
        ready = [one for one in ended if one.ready]
        others = [one for one in ended if not one.ready]
        try:
            if others and is_all and not ready:
                await self._tell(job, site, "delete", wait.request, [])
            elif others:
                await self._tell(job, site, "cancel", wait.request, self._known_paths(job, site, others))
            if ready:
                await self._tell(job, site, "release", wait.request, self._known_paths(job, site, ready))
        except SiteUnansweredError as error:
            found.error = error.failure
            if wait.errors < _MOST_RELEASES:
                return
            self._log.warn(
                "site {site} could not be told that files of request {request} are not needed any more, which ends with"
                " its lifetime: {why}",
                job=job.id,
                site=site.id,
                request=wait.request,
                why=error.failure.message,
            )
            found.error = None
        found.left |= {one.id for one in ended}

    async def _tell(self, job: JobRecord, site: Site, action: Action, request: str, paths: Sequence[str]) -> None:
        try:
            await self.apis.ask(job.user_id, site, action, paths, request=request)
        except SiteUnansweredError as error:
            # It is forgotten already, or never had these files.
            if error.failure.remedy in _TEMPORARY and error.failure.code is not FailureCode.UNKNOWN:
                raise

    # -- paths

    def _paths(self, found: _Findings, job: JobRecord, site: Site, waiting: Sequence[WaitingElement]) -> dict[int, str]:
        """Percent-encoded paths by number; an element whose path no API can name fails."""
        paths = {}
        for one in waiting:
            try:
                paths[one.id] = _server_path(job, site, one.path)
            except InvalidPathError as error:
                found.failed[one.id] = _failure(found.wait.kind, FailureCode.INVALID_NAME, str(error))
                # No request is about it, so there is nothing to withdraw.
                found.left.add(one.id)
        return paths

    def _known_paths(self, job: JobRecord, site: Site, members: Sequence[WaitingElement]) -> list[str]:
        """The paths of elements that a request may be about."""
        paths = []
        for one in members:
            with suppress(InvalidPathError):
                paths.append(_server_path(job, site, one.path))
        return paths


def _server_path(job: JobRecord, site: Site, path: str) -> str:
    """The path of a file as the tape API of its site names it, percent-encoded: that of its HTTPS URL."""
    protocol = JobProtocol.HTTPS if JobProtocol.HTTPS in site.endpoints else job.protocol
    if protocol not in site.endpoints:
        protocol = min(site.endpoints)
    url = StorageUrl(storage_url(site, protocol, path))
    try:
        url.path.decode()
    except UnicodeDecodeError as error:
        raise InvalidPathError("a tape API takes names in UTF-8 only") from error
    return "/" + url.encoded_path.lstrip("/")


def _number(numbers: Sequence[int], one: TapeFile) -> int | None:
    return numbers[one.path] if 0 <= one.path < len(numbers) else None


def _failure(kind: WaitKind, code: FailureCode, message: str) -> AttemptFailure:
    return AttemptFailure(HOLDS[kind].scope, code, message)


def _failure_of_text(kind: WaitKind, text: str) -> AttemptFailure:
    words = text.lower()
    code = next((code for known, code in _ERRORS if any(word in words for word in known)), FailureCode.TAPE_ERROR)
    return _failure(kind, code, text)
