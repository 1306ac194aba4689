"""The engine: claims due elements, runs them on agents, and settles the verified results."""
