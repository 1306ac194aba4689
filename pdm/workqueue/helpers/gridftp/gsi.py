"""Grid security contexts (GSSAPI of the Globus Toolkit): login with a proxy, and wrapping of messages afterwards.

The credential and the trusted authorities come from the environment: ``X509_USER_PROXY``, ``X509_CERT_DIR``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_size_t, c_uint32, c_void_p

#: Debian's package of the library.
PACKAGE = "libglobus-gssapi-gsi4"
LIBRARY = "libglobus_gssapi_gsi.so.4"
#: Delegate a full proxy, authenticate both ends, allow integrity and encryption (RFC 2744).
_WANTED = 1 | 2 | 16 | 32
_DELEGATION = 1
#: The login is that of TLS and no more: Globus adds a byte of each end otherwise (GSS_C_GLOBUS_SSL_COMPATIBLE).
_PLAIN_TLS = 16384
_BOTH_ROLES = 0
_CONTINUE_NEEDED = 1
#: The upper half of a major status is the error.
_ERROR_MASK = 0xFFFF0000


class GsiError(Exception):
    """A login or a token was refused; the message has the reason."""


class _Given(Structure):
    """gss_buffer_desc filled by us; it keeps the assigned bytes object alive."""

    _fields_ = (("length", c_size_t), ("value", c_char_p))


class _Taken(Structure):
    """gss_buffer_desc filled by the library."""

    _fields_ = (("length", c_size_t), ("value", c_void_p))


_GIVEN, _TAKEN = POINTER(_Given), POINTER(_Taken)


class Gsi:
    """The library, with the credential of this process.

    Raises:
        OSError: it is not installed.
        GsiError: it cannot be initialised.
    """

    def __init__(self) -> None:
        self._common = ctypes.CDLL("libglobus_common.so.0", mode=ctypes.RTLD_GLOBAL)
        self._slow = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        # These calls take microseconds, ten thousands of times a second: releasing the GIL would cost more.
        self._quick = ctypes.PyDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        self._declare()
        self._common.globus_thread_set_model(b"pthread")
        # The library blocks most signals; programs started later would inherit that and ignore SIGTERM.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        status = self._common.globus_module_activate(byref(c_char.in_dll(self._slow, "globus_i_gsi_gssapi_module")))
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if status != 0:
            raise GsiError("the GSSAPI library could not be set up")
        self._host_based = c_void_p.in_dll(self._slow, "GSS_C_NT_HOSTBASED_SERVICE")
        #: By directory of authorities: the library reads them with a credential, not at a login.
        self._credentials: dict[str | None, c_void_p] = {}
        self._guard = threading.Lock()

    def credential(self) -> c_void_p:
        """The credential of this process, for the currently trusted authorities; raises `GsiError`."""
        trusted = os.environ.get("X509_CERT_DIR")
        with self._guard:
            credential = self._credentials.get(trusted)
            if credential is None:
                credential, minor = c_void_p(), c_uint32()
                status = self._slow.gss_acquire_cred(
                    byref(minor), None, 0, None, _BOTH_ROLES, byref(credential), None, None
                )
                self._check(status, minor, "the credential cannot be used")
                self._credentials[trusted] = credential
            return credential

    def _declare(self) -> None:
        common, slow, quick = self._common, self._slow, self._quick
        common.globus_thread_set_model.argtypes = [c_char_p]
        common.globus_module_activate.argtypes = [c_void_p]
        common.globus_error_get.argtypes = [c_uint32]
        common.globus_error_get.restype = c_void_p
        common.globus_error_print_friendly.argtypes = [c_void_p]
        common.globus_error_print_friendly.restype = c_void_p
        common.globus_object_free.argtypes = [c_void_p]
        common.globus_object_free.restype = None
        pointer, number = POINTER(c_void_p), POINTER(c_uint32)
        slow.gss_acquire_cred.argtypes = [number, c_void_p, c_uint32, c_void_p, c_int, pointer, c_void_p, number]
        slow.gss_inquire_cred.argtypes = [number, c_void_p, pointer, c_void_p, c_void_p, c_void_p]
        slow.gss_import_name.argtypes = [number, _GIVEN, c_void_p, pointer]
        slow.gss_release_name.argtypes = [number, pointer]
        slow.gss_init_sec_context.argtypes = [
            *(number, c_void_p, pointer, c_void_p, c_void_p, c_uint32, c_uint32, c_void_p),
            *(_GIVEN, c_void_p, _TAKEN, number, number),
        ]
        slow.gss_accept_sec_context.argtypes = [
            *(number, pointer, c_void_p, _GIVEN, c_void_p, pointer),
            *(c_void_p, _TAKEN, number, number, c_void_p),
        ]
        slow.gss_inquire_context.argtypes = [
            *(number, c_void_p, pointer, c_void_p, c_void_p),
            *(c_void_p, c_void_p, c_void_p, c_void_p),
        ]
        slow.gss_compare_name.argtypes = [number, c_void_p, c_void_p, POINTER(c_int)]
        slow.gss_delete_sec_context.argtypes = [number, pointer, c_void_p]
        quick.gss_wrap.argtypes = [number, c_void_p, c_int, c_int, _GIVEN, POINTER(c_int), _TAKEN]
        quick.gss_unwrap.argtypes = [number, c_void_p, _GIVEN, _TAKEN, POINTER(c_int), number]
        quick.gss_release_buffer.argtypes = [number, _TAKEN]
        self._c = ctypes.CDLL(None)
        self._c.free.argtypes = [c_void_p]
        self._c.free.restype = None

    def _check(self, status: int, minor: c_uint32, what: str) -> None:
        if not status & _ERROR_MASK:
            return
        error = self._common.globus_error_get(minor)
        text = None
        if error:
            text = self._common.globus_error_print_friendly(error)
            self._common.globus_object_free(error)
        reason = "no reason is given"
        if text:
            reason = ctypes.string_at(text).decode("utf-8", "backslashreplace").strip()
            self._c.free(text)
        raise GsiError(f"{what}:\n{reason}")


class SecurityContext:
    """One login at one server, then the wrapping of commands and replies. Used by one thread at a time.

    Args:
        gsi: the library.
        host: name of the server that its certificate must have; None for the other end of a data connection, which has
            the proxy that we have delegated.
        accepts: whether the other end, which has connected to us, begins.
        plain_tls: whether the login is that of TLS and no more, as on encrypted data connections.

    Raises:
        GsiError: the name, or the credential, cannot be used.
    """

    def __init__(self, gsi: Gsi, host: str | None, *, accepts: bool = False, plain_tls: bool = False) -> None:
        self._gsi = gsi
        self._accepts = accepts
        self._credential: c_void_p | None = None
        self._minor = c_uint32()
        self._context = c_void_p()
        self._name = c_void_p()
        # Made once: they are used for every command and reply.
        self._given, self._answer = _Given(), _Taken()
        self._by_minor, self._by_given, self._by_answer = map(byref, (self._minor, self._given, self._answer))
        self._wanted = _WANTED | (_PLAIN_TLS if plain_tls else 0)
        # What the library reads at the first step, and writes then.
        self._flags = c_uint32(_PLAIN_TLS if plain_tls else 0)
        if host is None:
            self._wanted &= ~_DELEGATION
            status = gsi._slow.gss_inquire_cred(
                *(byref(self._minor), gsi.credential(), byref(self._name), None, None, None)
            )
            gsi._check(status, self._minor, "the credential has no name")
            return
        service = b"host@" + host.encode("idna")
        name = _Given(len(service), service)
        status = gsi._slow.gss_import_name(byref(self._minor), byref(name), gsi._host_based, byref(self._name))
        gsi._check(status, self._minor, f"the host name {host} cannot be used")

    def step(self, token: bytes | None) -> tuple[bytes, bool]:
        """Continue the login.

        Args:
            token: received from the server; None to begin.

        Returns:
            The token to send to the server (may be empty), and whether the login is complete.

        Raises:
            GsiError: one end does not trust the other.
        """
        if self._credential is None:
            self._credential = self._gsi.credential()
        if self._accepts:
            return self._accept(token or b"")
        given = None if token is None else byref(_Given(len(token), token))
        status = self._gsi._slow.gss_init_sec_context(
            *(byref(self._minor), self._credential, byref(self._context), self._name),
            *(None, self._wanted, 0, None, given, None, self._by_answer, None, None),
        )
        self._gsi._check(status, self._minor, "the login failed")
        return self._taken(), not status & _CONTINUE_NEEDED

    def _accept(self, token: bytes) -> tuple[bytes, bool]:
        """Continue the login of the other end; at its end, that must have our own identity."""
        if not token:
            return b"", False
        status = self._gsi._slow.gss_accept_sec_context(
            *(byref(self._minor), byref(self._context), self._credential, byref(_Given(len(token), token)), None),
            *(None, None, self._by_answer, byref(self._flags), None, None),
        )
        self._gsi._check(status, self._minor, "the login failed")
        answer = self._taken()
        complete = not status & _CONTINUE_NEEDED
        if complete:
            self._check_identity()
        return answer, complete

    def _check_identity(self) -> None:
        """Raise `GsiError` unless the other end has our own identity."""
        name, same = c_void_p(), c_int()
        status = self._gsi._slow.gss_inquire_context(
            *(byref(self._minor), self._context, byref(name), None, None, None, None, None, None)
        )
        self._gsi._check(status, self._minor, "the other end has no name")
        try:
            status = self._gsi._slow.gss_compare_name(byref(self._minor), name, self._name, byref(same))
            self._gsi._check(status, self._minor, "the name of the other end cannot be used")
        finally:
            self._gsi._slow.gss_release_name(byref(self._minor), byref(name))
        if not same.value:
            raise GsiError("the other end of the data connection has another identity")

    def wrap(self, data: bytes, *, encrypted: bool = False) -> bytes:
        """Protect the integrity of a message to be sent, or encrypt it; raises `GsiError`."""
        self._given.length, self._given.value = len(data), data
        status = self._gsi._quick.gss_wrap(
            self._by_minor, self._context, int(encrypted), 0, self._by_given, None, self._by_answer
        )
        if status & _ERROR_MASK:
            self._gsi._check(status, self._minor, "a message cannot be wrapped")
        return self._taken()

    def unwrap(self, data: bytes) -> bytes:
        """Verify and unwrap a received message; raises `GsiError`."""
        self._given.length, self._given.value = len(data), data
        status = self._gsi._quick.gss_unwrap(self._by_minor, self._context, self._by_given, self._by_answer, None, None)
        if status & _ERROR_MASK:
            self._gsi._check(status, self._minor, "a message cannot be unwrapped")
        return self._taken()

    def close(self) -> None:
        """Free the library's memory; the context cannot be used afterwards."""
        if self._context.value is not None:
            self._gsi._slow.gss_delete_sec_context(byref(self._minor), byref(self._context), None)
        if self._name.value is not None:
            self._gsi._slow.gss_release_name(byref(self._minor), byref(self._name))

    def _taken(self) -> bytes:
        if not self._answer.length:
            return b""
        data = ctypes.string_at(self._answer.value, self._answer.length)
        self._gsi._quick.gss_release_buffer(self._by_minor, self._by_answer)
        return data
