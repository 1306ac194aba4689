"""The parts of the FTS3 helper."""
