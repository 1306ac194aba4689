"""The logs of attempts: files that people can tail."""
