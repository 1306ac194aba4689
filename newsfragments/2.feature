The queue moves real files: a daemon with the whole REST reference over TLS client certificates, GridFTP, local directories
and simulated transfers, the ``pdm`` command, a Python client, and a test grid to try it all on.
