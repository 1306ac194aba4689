"""What the client is made of: settings, connection, errors. Users import `WorkqueueClient` and `blocking`."""
