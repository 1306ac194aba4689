"""Settings of certificates, users, credentials and logins: sections tls, users, credentials, ssh and oidc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import field

from pdm.workqueue.config.values import (
    DAY_S,
    AddressRanges,
    Duration,
    DurationOrZero,
    FilePath,
    OptionalPath,
    StatePath,
    Subjects,
    Weights,
    kind,
)


class TlsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The host certificate, and which client certificates are accepted.

    Attributes:
        certificate: PEM file of the host certificate, with its chain if it has one.
        key: PEM file of its private key.
        trust: a PEM file of authorities, or a hashed directory of them (as ``/etc/grid-security/certificates``).
        crl: ``require`` refuses clients of an authority without a revocation list, ``if-present`` checks the lists
            that are there, ``off`` checks none.
        crl_refresh_s: how often authorities, revocation lists and signing policies are read again.
        signing_policy: ``require`` refuses clients of an authority without a signing policy (or namespaces file),
            ``if-present`` applies the policies that are there and binds other users to the authority of their first
            connection, ``off`` does neither.
    """

    certificate: FilePath = Path("certificates/host.crt")
    key: FilePath = Path("certificates/host.key")
    trust: FilePath = Path("certificates/trust")
    crl: Literal["require", "if-present", "off"] = "if-present"
    crl_refresh_s: Duration = field(default=300.0, name="crl_refresh")
    signing_policy: Literal["require", "if-present", "off"] = "if-present"


class UserSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may use the service.

    Attributes:
        register: ``anyone`` with a trusted certificate becomes a user at its first request, or only ``listed`` ones.
        listed_users: file of subjects, one a line: ``SUBJECT``, or ``ROLE SUBJECT`` (role ``user`` or ``operator``).
        operators: subjects that may see and control the jobs of all users.
        weights: share of the work of a user, relative to other waiting users; 1 by default.
    """

    register: Literal["anyone", "listed"] = "anyone"
    listed_users: OptionalPath = None
    operators: Subjects = ()
    weights: Weights = field(default_factory=dict)


class CredentialSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Delegated credentials.

    Attributes:
        key_file: the key under which they are encrypted in the database; made at first start.
        folder: where a credential lies as a 0600 file while a helper uses it; best on a memory file system.
        trust_dir: hashed directory of the authorities of storage servers.
        minimum_lifetime_s: a job is not accepted on a credential that ends sooner.
        expected_duration_s: a job is expected to take at least so long; on a credential that ends sooner it is accepted
            with a warning.
        key_bits: length of the RSA key of a delegated proxy.
        longest_lifetime_s: a delegated proxy that is valid for longer is not accepted.
    """

    key_file: StatePath = Path("credentials.key")
    folder: StatePath = Path("credentials")
    trust_dir: FilePath = Path("/etc/grid-security/certificates")
    minimum_lifetime_s: DurationOrZero = field(default=600.0, name="minimum_lifetime")
    expected_duration_s: DurationOrZero = field(default=1800.0, name="expected_duration")
    key_bits: Literal[2048, 3072, 4096] = 2048
    longest_lifetime_s: Duration = field(default=30 * DAY_S, name="longest_lifetime")


class SshSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How SFTP servers are reached.

    Attributes:
        key: private key, without a passphrase; without it nothing is moved by SSH.
        known_hosts: the host keys of the servers, as ssh(1) keeps them; a server that is not in it is refused.
        user: account at the servers; by default the name of the daemon's own.
    """

    key: OptionalPath = None
    known_hosts: FilePath = Path("known_hosts")
    user: str = ""


class IssuerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the service speaks to token issuers.

    Attributes:
        issuers: URLs that any user may choose for a site; others are for operators.
        allowed: addresses and ports of issuers, although they are of this machine or its link.
        ca: PEM file or hashed directory of the authorities of issuers; those of the system without it.
        timeout_s: for one request, from the resolution of the name to the end of the answer.
        margin_s: an access token is renewed so long before its end, or at half of a shorter lifetime.
    """

    issuers: Annotated[tuple[str, ...], kind("issuers")] = ()
    allowed: AddressRanges = ()
    ca: OptionalPath = None
    timeout_s: Annotated[float, kind("duration", gt=0, le=60)] = field(default=20.0, name="timeout")
    margin_s: Annotated[float, kind("duration", ge=1, le=86400)] = field(default=300.0, name="margin")
