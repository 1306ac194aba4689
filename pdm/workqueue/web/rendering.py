"""Rendering of the pages: templates, the text forms that they use, and the files that browsers load with them."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlencode

from attrs import frozen
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pdm.workqueue import __version__
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.formatting import (
    display_bytes,
    display_duration,
    display_name,
    display_text,
    display_time,
    display_timestamp,
)
from pdm.workqueue.http.endpoints import ROOT
from pdm.workqueue.http.problems import InvalidInputError

_PACKAGE = "pdm.workqueue.web"
#: Address and name of each view that the head of a page links to; the last one is for operators.
NAVIGATION: Sequence[tuple[str, str]] = (
    ("/", "Jobs"),
    ("/web/files", "Files"),
    ("/web/sites", "Sites"),
    ("/web/credentials", "Credentials"),
    ("/web/operators", "Operators"),
)
#: Mark of each status, so that colour is not the only difference.
_MARKS: Mapping[JobStatus, str] = {
    JobStatus.NEW: "○",
    JobStatus.SUBMITTED: "○",
    JobStatus.RUNNING: "▶",
    JobStatus.DONE: "✓",
    JobStatus.FAILED: "✕",
    JobStatus.CANCELLED: "⊘",
    JobStatus.HELD: "‖",
}


@frozen
class StaticFile:
    """A file that browsers load; `digest` is of its content."""

    content: bytes
    media_type: str
    digest: str


@cache
def _static_files() -> Mapping[str, StaticFile]:
    found = {}
    for entry in (files(_PACKAGE) / "static").iterdir():
        content = entry.read_bytes()
        media_type = mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
        if media_type.startswith("text/"):
            media_type += "; charset=utf-8"
        found[entry.name] = StaticFile(content, media_type, hashlib.sha256(content).hexdigest()[:16])
    return found


def static_file(name: str) -> StaticFile | None:
    """A file of the package; None if there is none of that name."""
    return _static_files().get(name)


def _static_url(name: str) -> str:
    return f"/web/static/{quote(name)}?v={_static_files()[name].digest}"


def files_url(site: int, path: str) -> str:
    """The address of the view of a directory at a site."""
    return f"/web/files?{urlencode({'site': site, 'path': path})}"


def path_links(site: int, path: str) -> Markup:
    """A path at a site, each directory of which is a link to its view."""
    parts, linked = path.split("/"), []
    for number, part in enumerate(parts):
        if not part:
            continue
        url = files_url(site, "/".join(parts[: number + 1]) or "/")
        linked.append(Markup('<a href="{}">{}</a>').format(url, display_name(part)))
    lead = Markup('<a href="{}">/</a>').format(files_url(site, "/")) if path.startswith("/") else Markup()
    return Markup('<span class="path">{}{}</span>').format(lead, Markup("/<wbr>").join(linked))


def badge(status: JobStatus | str) -> Markup:
    """A status as a mark and a word."""
    known = JobStatus.parse(status)
    return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
        known.name.lower(), _MARKS[known], known.name
    )


def when(timestamp: datetime | None) -> Markup:
    """A time for people and programs; ``live.js`` adds how long ago it is."""
    if timestamp is None:
        return Markup('<span class="unknown">–</span>')
    return Markup('<time datetime="{}">{}</time>').format(timestamp.isoformat(), display_timestamp(timestamp))


def count(number: int, word: str = "", words: str = "") -> str:
    """A number with thin spaces between thousands, and a noun: ``1 204 files``."""
    digits = f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if not word:
        return digits
    return f"{digits} {word if number == 1 else words or word + 's'}"


class Renderer:
    """Renders the templates of the package; its methods may be called in any thread."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=PackageLoader(_PACKAGE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(
            badge=badge,
            bytes=display_bytes,
            count=count,
            duration=display_duration,
            file_time=display_time,
            name=display_name,
            text=display_text,
            when=when,
        )
        self._environment.globals.update(
            api=ROOT,
            files_url=files_url,
            navigation=NAVIGATION,
            path_links=path_links,
            static=_static_url,
            version=__version__,
        )

    def render(self, template: str, context: Mapping[str, Any], fragments: Sequence[str] = ()) -> str:
        """A page, or only these blocks of it.

        Raises:
            InvalidInputError: the page has no such block.
        """
        loaded = self._environment.get_template(template)
        if not fragments:
            return loaded.render(context)
        for name in fragments:
            if name not in loaded.blocks:
                raise InvalidInputError(f"this page has no fragment {name[:100]!r}", "fragment")
        variables = loaded.new_context(dict(context))
        return "".join(piece for name in fragments for piece in loaded.blocks[name](variables))
