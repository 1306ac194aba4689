"""Helper processes: carry out requests that the daemon sends as JSON lines."""
