"""The fixtures of the pages."""

from __future__ import annotations

from tests.http.service import certificates, service

__all__ = ["certificates", "service"]
