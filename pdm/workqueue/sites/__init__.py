"""Sites, their endpoints, and the URLs of paths there."""
