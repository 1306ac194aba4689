"""The fixtures of the real service, as for the tests of its HTTP side."""

from __future__ import annotations

from tests.http.service import certificates, own_service, service

__all__ = ["certificates", "own_service", "service"]
