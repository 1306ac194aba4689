"""The two extents of an installation: the client alone, or with the libraries of the daemon."""

from __future__ import annotations

#: Modules of the libraries in the extra "server" of setup.cfg.
_SERVER_MODULES = frozenset(
    {
        *("sqlalchemy", "alembic", "klein", "werkzeug", "h11", "cronsim", "re2", "pathspec", "standardwebhooks"),
        *("jinja2", "prometheus_client", "aws_request_signer"),
    }
)


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """What to install where an import failed for want of the daemon's libraries; None if another module is missing."""
    module = (error.name or "").partition(".")[0]
    if module not in _SERVER_MODULES:
        return None
    return (
        f"this installation has only the client: the daemon's library {module} is missing;"
        " install it with: pip install 'pdm-workqueue[server]'"
    )
