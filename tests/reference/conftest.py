"""The fixtures of the real service."""

from __future__ import annotations

from tests.http.service import certificates, own_service, service

__all__ = ["certificates", "own_service", "service"]
