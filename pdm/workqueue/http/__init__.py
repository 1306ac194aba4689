"""The REST API: a table of endpoints, and one dispatcher that authenticates, decodes, validates, answers and logs."""
