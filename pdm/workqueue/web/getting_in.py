"""The page for browsers without a valid certificate: what is missing, and how to get in."""

from __future__ import annotations

from attrs import field, frozen

from pdm.workqueue.http.problems import NotAuthenticatedError
from pdm.workqueue.http.request import ApiRequest, write_response
from pdm.workqueue.web.pages import HTML, set_page_headers
from pdm.workqueue.web.rendering import Renderer

_TEMPLATE = "getting_in.html"
#: Rendered pages that are kept, by the text of the problem; anybody may ask for the page, so it must cost little.
_MAX_KEPT = 100


@frozen(eq=False)
class AccessPage:
    """Writes the page; the same for every address."""

    _renderer: Renderer = field(factory=Renderer)
    _pages: dict[str, bytes] = field(factory=dict)

    def write(self, request: ApiRequest, error: NotAuthenticatedError) -> None:
        """Answer a request with status 401."""
        page = self._pages.get(error.detail)
        if page is None:
            context = {"caller": None, "message": "", "problem": None, "now": None, "path": "", "detail": error.detail}
            page = self._renderer.render(_TEMPLATE, context).encode("utf-8", "replace")
            if len(self._pages) >= _MAX_KEPT:
                self._pages.clear()
            self._pages[error.detail] = page
        set_page_headers(request)
        write_response(request, error.status, page, HTML)
