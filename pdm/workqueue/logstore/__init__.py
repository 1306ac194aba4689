"""The logs of attempts, one file each."""
