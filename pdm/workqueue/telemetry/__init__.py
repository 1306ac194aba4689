"""Logging, clocks, and background work whose failures are logged."""
