"""The configuration file: what can be set, and how it is read."""
