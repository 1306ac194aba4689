"""X.509: TLS with proxies and CRLs, delegation, encryption of stored credentials."""
