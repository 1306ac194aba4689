"""Pages for people: what the API gives out and does, as HTML for browsers."""
