"""The view of files: two panes, each with a directory at a site; every act on them is a job.

A pane shows the result of a LIST job, which is registered when a directory is opened: an address alone starts nothing.
Names may have any characters, and a browser changes line ends in forms, so paths stand there percent-encoded.
"""

from __future__ import annotations

import posixpath
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote, urlencode

import attrs
import msgspec
from attrs import frozen
from msgspec import Meta

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.failures import hint_for
from pdm.workqueue.domain.formatting import display_name
from pdm.workqueue.domain.jobs import FIRST_PRIORITY, MOST_PREDECESSORS, JobRecord
from pdm.workqueue.domain.paths import joined
from pdm.workqueue.http import transactions
from pdm.workqueue.http.endpoints import jobs
from pdm.workqueue.http.problems import ApiError, InvalidInputError
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.web.directories import Directories, DirectoryPage
from pdm.workqueue.web.jobs import Number
from pdm.workqueue.web.pages import Page, Redirect, Visit, page
from pdm.workqueue.wire.requests import SubmitList, SubmitMkdir, SubmitRemove, SubmitRename

#: Address of the view, and label of the jobs that it starts.
URL, LABEL = "/web/files", "files"
#: Seconds that a page waits for its listings.
_WAIT_S = 3.0
_directories = Directories()

PaneName = Literal["left", "right"]
_PageNumber = Annotated[int, Meta(ge=1, le=1_000_000_000)]


@frozen
class Place:
    """A site by one of its protocols."""

    site: int
    protocol: str

    @property
    def word(self) -> str:
        return f"{self.site}:{self.protocol}"


@frozen
class Pane:
    """What a pane is to show.

    Attributes:
        site: ``NUMBER:PROTOCOL`` or ``NUMBER``; None if none is chosen.
        path: exact; None for the default directory of the site.
        job: the LIST job whose result it shows; None if the directory was not opened.
    """

    site: str | None = None
    path: str | None = None
    job: int | None = None
    page: int = 1


@frozen
class Panes:
    """Both panes, as an address has them; `acts` are jobs that were registered last."""

    left: Pane
    right: Pane
    hidden: bool = False
    acts: Sequence[int] = ()

    def of(self, side: PaneName) -> Pane:
        return self.left if side == "left" else self.right

    def other(self, side: PaneName) -> Pane:
        return self.right if side == "left" else self.left

    def changed(self, side: PaneName, **changes: Any) -> Panes:
        if side == "left":
            return attrs.evolve(self, left=attrs.evolve(self.left, **changes))
        return attrs.evolve(self, right=attrs.evolve(self.right, **changes))

    def url(self, **changes: Any) -> str:
        """The address of the view."""
        state = attrs.evolve(self, **changes)
        fields: list[tuple[str, object]] = []
        for prefix, pane in (("", state.left), ("to_", state.right)):
            values = {
                "site": pane.site,
                "path": pane.path,
                "job": pane.job,
                "page": None if pane.page == 1 else pane.page,
            }
            fields += [(prefix + name, value) for name, value in values.items() if value is not None]
        fields += [("act", act) for act in state.acts]
        if state.hidden:
            fields.append(("hidden", 1))
        return f"{URL}?{urlencode(fields)}" if fields else URL

    def page_url(self, side: PaneName, number: int) -> str:
        """The address of another page of one pane."""
        return self.changed(side, page=number).url()


class FilesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The address of the view; ``to_*`` is the right pane."""

    site: str | None = None
    path: str | None = None
    job: Number | None = None
    page: _PageNumber = 1
    to_site: str | None = None
    to_path: str | None = None
    to_job: Number | None = None
    to_page: _PageNumber = 1
    act: tuple[Number, ...] = ()
    hidden: bool = False

    @property
    def panes(self) -> Panes:
        return Panes(
            Pane(self.site, self.path, self.job, self.page),
            Pane(self.to_site, self.to_path, self.to_job, self.to_page),
            self.hidden,
            self.act,
        )


class FilesForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pane with what is selected in it, and the state of the other.

    Attributes:
        path, other_path, name, open, old_name: percent-encoded.
        site: whose directory is shown, and acted on.
        place: what is chosen as the site to list next.
        typed: the text of the path box.
        name: names of the selected entries.
        open: name of the directory to open.
    """

    side: PaneName
    site: str | None = None
    path: str | None = None
    place: str | None = None
    typed: str | None = None
    job: Number | None = None
    page: _PageNumber = 1
    other_site: str | None = None
    other_path: str | None = None
    other_job: Number | None = None
    other_page: _PageNumber = 1
    hidden: bool = False
    name: tuple[str, ...] = ()
    open: str | None = None
    new_name: str | None = None
    old_name: str | None = None
    confirmed: bool = False

    @property
    def panes(self) -> Panes:
        own = Pane(self.site, _decoded(self.path), self.job, self.page)
        other = Pane(self.other_site, _decoded(self.other_path), self.other_job, self.other_page)
        return Panes(own, other, self.hidden) if self.side == "left" else Panes(other, own, self.hidden)

    @property
    def names(self) -> list[str]:
        """Names of the selected entries."""
        return [unquote(name) for name in self.name]


def encoded_path(path: str) -> str:
    """A path or name for a field of a form."""
    return quote(path, safe="/", errors="replace")


def _decoded(path: str | None) -> str | None:
    return None if path is None else unquote(path)


def field_text(path: str) -> str:
    """A path as an input field shows it: as it is, unless it has characters that a field cannot hold or show."""
    return path if "\\" not in display_name(path.replace("\\", "")) else display_name(path)


def chosen_site(visit: Visit, word: str) -> tuple[Site, JobProtocol]:
    """The site and protocol of ``NUMBER:PROTOCOL``; without a protocol, the first that the site can be listed by.

    Raises:
        InvalidInputError: there is no such site or protocol.
    """
    number, _, protocol = word.partition(":")
    site = visit.api.sites.by_id(int(number)) if number.isascii() and number.isdecimal() and len(number) < 10 else None
    if site is None or not site.is_open_to(visit.caller.user_id):
        raise InvalidInputError(f"there is no site {number[:20]!r}", "site")
    known = listed_protocols(visit, site)
    if protocol:
        known = [each for each in known if each.name == protocol]
    if not known:
        raise InvalidInputError(
            f"site {site.name} cannot be listed{' by ' + protocol[:20] if protocol else ''}", "site"
        )
    return site, known[0]


def listed_protocols(visit: Visit, site: Site) -> list[JobProtocol]:
    """The protocols of a site by which its directories can be listed; the simulated one last."""
    found = [each for each in site.endpoints if visit.api.supports(each, JobType.LIST)]
    return sorted(found, key=lambda each: (each is JobProtocol.DUMMY, each.value))


@frozen(kw_only=True)
class PaneView:
    """A pane as it is shown.

    Attributes:
        places: of each site, its name and the words and names of its protocols.
        message: what went wrong, or what is awaited.
    """

    side: PaneName
    word: str
    label: str
    path: str
    parent: str | None
    places: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    job: JobRecord | None = None
    content: DirectoryPage | None = None
    message: str = ""
    is_failed: bool = False

    @property
    def is_pending(self) -> bool:
        return self.job is not None and not self.job.status.is_final


async def pane_view(visit: Visit, panes: Panes, side: PaneName) -> PaneView:
    """What a pane shows; waits a little for a listing that has not ended."""
    pane, api = panes.of(side), visit.api
    sites = [site for site in api.sites.listed() if site.is_open_to(visit.caller.user_id)]
    places = [
        (site.name, [(Place(site.id, each.name).word, each.name) for each in listed_protocols(visit, site)])
        for site in sites
    ]
    places = [place for place in places if place[1]]
    if pane.site is None:
        return PaneView(side=side, word="", label="", path="", parent=None, places=places)
    site, protocol = chosen_site(visit, pane.site)
    path = site.default_folder if pane.path is None else pane.path
    plain = path.rstrip("/")
    view = PaneView(
        side=side,
        word=Place(site.id, protocol.name).word,
        label=site.name,
        path=path,
        parent=(posixpath.dirname(plain) or None) if plain.startswith(("/", "~/")) else None,
        places=places,
    )
    if pane.job is None:
        return view
    job = await api.awaited_job(pane.job, visit.caller.scope, 0.0 if visit.fragments else _WAIT_S)
    if job.type is not JobType.LIST or job.src_siteid != site.id or job.src_filepath != path:
        raise InvalidInputError(f"job {job.id} is no listing of this directory", "job")
    view = attrs.evolve(view, job=job)
    if job.status is JobStatus.DONE:
        content = await _directories.page(api, job.id, path, pane.page, hidden=panes.hidden)
        return attrs.evolve(view, content=content)
    _, element = await api.database.read("why it failed", transactions.fetch_element, job.id, 0, visit.caller.scope)
    if element.failure is not None:
        text = f"{element.failure.message}. {hint_for(element.failure.code, job.type)}"
        return attrs.evolve(view, message=text, is_failed=job.status.is_final)
    return attrs.evolve(view, message="" if view.is_pending else f"the listing is {job.status.name}")


async def files_page(
    visit: Visit, panes: Panes, *, problem: ApiError | None = None, renaming: tuple[PaneName, str] | None = None
) -> Page:
    """The view; `renaming` is the entry whose name can be edited."""
    views = [await pane_view(visit, panes, side) for side in ("left", "right") if visit.wants(side, "panes")]
    context = {
        "panes": panes,
        "views": views,
        "acts": [await visit.api.job(each, visit.caller.scope) for each in panes.acts[:MOST_PREDECESSORS]],
        "renaming": renaming,
        "is_live": any(view.is_pending for view in views),
        "encoded": encoded_path,
        "field_text": field_text,
    }
    return Page(
        template="files.html", context=context, status=200 if problem is None else problem.status, problem=problem
    )


@page("GET", URL, query=FilesQuery)
async def show_files(visit: Visit, query: FilesQuery) -> Page:
    """The two panes."""
    return await files_page(visit, query.panes)


@frozen
class ActPlace:
    """Where an act happens: the site, protocol and directory of the pane that was used."""

    site: Site
    protocol: JobProtocol
    directory: str

    def fields(self, path: str) -> dict[str, Any]:
        """Fields of a submission."""
        return {"src_siteid": self.site.id, "src_filepath": path, "protocol": self.protocol.name, "label": LABEL}


async def in_view(
    visit: Visit, form: FilesForm, act: Callable[[Visit, FilesForm, ActPlace], Awaitable[Page | Redirect]]
) -> Page | Redirect:
    """Carry out an act; its error is shown in the view."""
    try:
        if form.site is None:
            raise InvalidInputError("choose a site, and list a directory", "site")
        site, protocol = chosen_site(visit, form.site)
        directory = form.panes.of(form.side).path
        return await act(visit, form, ActPlace(site, protocol, site.default_folder if directory is None else directory))
    except ApiError as error:
        if error.status >= 500:
            raise
        return await files_page(visit, form.panes, problem=error)


def selected(form: FilesForm, *, only: int | None = None) -> list[str]:
    """Names of the selected entries.

    Raises:
        InvalidInputError: none is selected, or more than `only`.
    """
    names = list(dict.fromkeys(form.names))
    if not names:
        raise InvalidInputError("select something first", "name")
    if only is not None and len(names) > only:
        raise InvalidInputError("select one entry only", "name")
    if any(name in ("", ".", "..") or "/" in name for name in names):
        raise InvalidInputError("a name of an entry is expected", "name")
    return names


def _new_name(text: str | None) -> str:
    if not text or text in (".", ".."):
        raise InvalidInputError("type a name", "new_name")
    return text


async def _listed(
    visit: Visit, form: FilesForm, at: ActPlace, path: str, acts: Sequence[int], message: str
) -> Redirect:
    """Register the listing of a directory, after the jobs that change it, and show it."""
    body = SubmitList(
        **at.fields(path),
        extra_opts={"depth": 1},
        priority=FIRST_PRIORITY,
        after=list(acts[:MOST_PREDECESSORS]) or None,
        after_any=True if acts else None,
    )
    job: Any = await jobs.submit_list.handler(visit.api, visit.caller, body=body, key=None)
    panes = form.panes.changed(form.side, site=Place(at.site.id, at.protocol.name).word, path=path, job=job.id, page=1)
    return Redirect(panes.url(acts=tuple(acts)), message)


@page("POST", f"{URL}/list", form=FilesForm)
async def list_directory(visit: Visit, form: FilesForm) -> Page | Redirect:
    """Open a directory."""
    if form.open is None:
        form = msgspec.structs.replace(form, site=form.place, path=_path_to_list(form))
    return await in_view(visit, form, _open)


async def _open(visit: Visit, form: FilesForm, at: ActPlace) -> Redirect:
    path = at.directory
    if form.open is not None:
        name = unquote(form.open)
        path = (posixpath.dirname(path.rstrip("/")) or "/") if name == ".." else joined(path, name)
    return await _listed(visit, form, at, path, (), "")


def _path_to_list(form: FilesForm) -> str | None:
    """The path that is typed, encoded; None for the default directory of the site."""
    shown = _decoded(form.path)
    if form.typed is None:
        return None
    if shown is None or form.typed != field_text(shown):
        return encoded_path(form.typed)
    return form.path if form.place == form.site else None


@page("POST", f"{URL}/mkdir", form=FilesForm)
async def make_directory(visit: Visit, form: FilesForm) -> Page | Redirect:
    """Make a directory in the one that is shown, with the missing ones above it."""

    async def act(visit: Visit, form: FilesForm, at: ActPlace) -> Redirect:
        name = _new_name(form.new_name)
        fields = at.fields(joined(at.directory, name))
        body = SubmitMkdir(**fields, extra_opts={"parents": True} if "/" in name else None)
        job: Any = await jobs.submit_mkdir.handler(visit.api, visit.caller, body=body, key=None)
        return await _listed(visit, form, at, at.directory, (job.id,), f"job {job.id} makes the directory {name}")

    return await in_view(visit, form, act)


@page("POST", f"{URL}/rename", form=FilesForm)
async def rename(visit: Visit, form: FilesForm) -> Page | Redirect:
    """Show the selected name as a field; then, with the new name, rename."""

    async def act(visit: Visit, form: FilesForm, at: ActPlace) -> Page | Redirect:
        if form.old_name is None:
            (name,) = selected(form, only=1)
            return await files_page(visit, form.panes, renaming=(form.side, name))
        old, new = unquote(form.old_name), _new_name(form.new_name)
        if "/" in new:
            raise InvalidInputError("a name has no slash; copy, and remove the source, to move", "new_name")
        if new == field_text(old):
            return Redirect(form.panes.url())
        body = SubmitRename(**at.fields(joined(at.directory, old)), dst_filepath=joined(at.directory, new))
        job: Any = await jobs.submit_rename.handler(visit.api, visit.caller, body=body, key=None)
        return await _listed(visit, form, at, at.directory, (job.id,), f"job {job.id} renames {old} to {new}")

    return await in_view(visit, form, act)


@page("POST", f"{URL}/remove", form=FilesForm)
async def remove(visit: Visit, form: FilesForm) -> Page | Redirect:
    """Show what would be removed; then, confirmed, remove: a job for each."""

    async def act(visit: Visit, form: FilesForm, at: ActPlace) -> Page | Redirect:
        names = selected(form)
        if not form.confirmed:
            context = {"form": form, "names": names, "at": at, "back": form.panes.url(), "encoded": encoded_path}
            return Page(template="files_remove.html", context=context)
        numbers = []
        for name in names:
            body = SubmitRemove(**at.fields(joined(at.directory, name)))
            job: Any = await jobs.submit_remove.handler(visit.api, visit.caller, body=body, key=None)
            numbers.append(job.id)
        return await _listed(visit, form, at, at.directory, numbers, f"{len(numbers)} to remove, a job for each")

    return await in_view(visit, form, act)
