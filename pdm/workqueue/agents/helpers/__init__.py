"""Helper programs: each is a process of its own, told what to do by JSON lines.

They import the standard library and each other only, because an operator may run them under another Python. Nothing
else of the project may be imported here; tests hold what they say against ``wire/agent_messages.py``.
"""
