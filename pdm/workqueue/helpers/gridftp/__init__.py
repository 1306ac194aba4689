"""GridFTP client on our own control connections: pipelined commands, and a fallback of one operation at a time."""
