"""The room that knows X.509: TLS with proxies and CRLs, delegation, and keeping credentials secret."""
