"""GridFTP over control channels of our own: many commands at once, or one operation at a time."""
