"""The field's own commands, ``globus-url-copy`` and ``gfal-*``, as child processes of the tools helper."""
