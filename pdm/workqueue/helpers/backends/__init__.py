"""Storage backends: local directories, SFTP, WebDAV and XRootD."""
