"""How the daemon tells what it does, and keeps its background work honest."""
