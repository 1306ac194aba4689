"""Where things are: sites, their endpoints, and the URLs of paths there."""
