"""All SQL: functions that run in a database thread, take a session first and give records back."""
