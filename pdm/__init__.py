"""PDM: moving research data between storage sites."""
