"""The logs of attempts: one file for each job."""
