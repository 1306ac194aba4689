"""What cryptography raises for a certificate that somebody has sent; its errors have no class in common.

Much is read late: a certificate may load, and its extensions, names or dates may not.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

#: To be caught wherever a certificate of others is loaded or looked into.
UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
