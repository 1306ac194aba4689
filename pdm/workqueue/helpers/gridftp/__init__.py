"""GridFTP: pipelined commands on our own control channels, and the Globus client library as fallback."""
