"""All SQL: functions that run in a database thread, take a session as first argument and return records."""
