"""GridFTP over our own control connections: pipelined commands, and one operation at a time as the fallback."""
