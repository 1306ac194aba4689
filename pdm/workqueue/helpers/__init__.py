"""Helper processes, which work on requests that the daemon sends as JSON lines."""
