"""Helper processes that do the moving: started, spoken to, watched, ended."""
