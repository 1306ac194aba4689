"""The REST door: endpoints as a table, and one place that decodes, checks, authorises, answers and logs."""
