"""Commands of the administrator: make an instance, check its configuration."""
