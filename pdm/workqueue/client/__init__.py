"""Parts of the client: settings, connection, delegation, errors. Users import `WorkqueueClient` and `blocking`."""
