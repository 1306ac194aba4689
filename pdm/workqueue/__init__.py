"""PDM Workqueue: a queue that lists, copies, removes, renames and makes directories at storage sites."""

__version__ = "0.1.0"
