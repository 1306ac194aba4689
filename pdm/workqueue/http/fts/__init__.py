"""The door for clients of FTS3: its REST API, as CERN's client, Rucio and DIRAC use it, over the service's own jobs."""
