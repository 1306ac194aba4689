"""The C library of the GridFTP clients, as far as it is used here: prototypes, and errors as text.

Every function has its argument types set: ctypes would cut pointers and 64-bit numbers otherwise.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, byref, c_char, c_char_p, c_int, c_int64, c_long, c_size_t, c_uint32, c_void_p

#: Debian's package that brings the library.
PACKAGE = "libglobus-ftp-client2"

Completed = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
DataArrived = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_int64, c_int)
TransferBegan = CFUNCTYPE(None, c_void_p, c_void_p, c_char_p, c_char_p, c_int)
MarkerArrived = CFUNCTYPE(None, c_void_p, c_void_p, c_long, c_char, c_int, c_int, c_int64)
TransferEnded = CFUNCTYPE(None, c_void_p, c_void_p, c_int)

_POINTER = POINTER(c_void_p)


class DataChannelProtection(ctypes.Structure):
    """globus_ftp_control_dcau_t."""

    _fields_ = (("mode", c_int), ("subject", c_char_p))


class GlobusError(Exception):
    """A call was refused at once; the text says why."""


class GlobusLibrary:
    """The loaded library.

    Raises:
        OSError: it is not installed.
        GlobusError: it could not be set up.
    """

    def __init__(self) -> None:
        self._c = ctypes.CDLL(None)
        self._c.free.argtypes = [c_void_p]
        self.common = ctypes.CDLL("libglobus_common.so.0", mode=ctypes.RTLD_GLOBAL)
        self.client = ctypes.CDLL("libglobus_ftp_client.so.2", mode=ctypes.RTLD_GLOBAL)
        self._declare()
        # Callbacks come on threads of the library, so that no thread of ours has to poll.
        if self.common.globus_thread_set_model(b"pthread") != 0:
            raise GlobusError("the Globus libraries refuse the thread model 'pthread'")
        for module in ("globus_i_ftp_client_module", "globus_i_ftp_client_perf_plugin_module"):
            if self.common.globus_module_activate(byref(c_char.in_dll(self.client, module))) != 0:
                raise GlobusError(f"the Globus libraries could not be set up ({module})")

    def _declare(self) -> None:
        common, client = self.common, self.client
        common.globus_thread_set_model.argtypes = [c_char_p]
        common.globus_module_activate.argtypes = [c_void_p]
        common.globus_error_get.argtypes = [c_uint32]
        common.globus_error_get.restype = c_void_p
        common.globus_error_print_friendly.argtypes = [c_void_p]
        common.globus_error_print_friendly.restype = c_void_p
        common.globus_object_free.argtypes = [c_void_p]
        common.globus_object_free.restype = None
        prototypes = {
            "handleattr_init": [_POINTER],
            "handleattr_destroy": [_POINTER],
            "handleattr_set_cache_all": [_POINTER, c_int],
            "handleattr_add_plugin": [_POINTER, _POINTER],
            "handle_init": [_POINTER, _POINTER],
            "handle_destroy": [_POINTER],
            "operationattr_init": [_POINTER],
            "operationattr_destroy": [_POINTER],
            "operationattr_set_mode": [_POINTER, c_int],
            "operationattr_set_list_uses_data_mode": [_POINTER, c_int],
            "operationattr_set_dcau": [_POINTER, POINTER(DataChannelProtection)],
            "third_party_transfer": [_POINTER, c_char_p, _POINTER, c_char_p, _POINTER, c_void_p, Completed, c_void_p],
            "machine_list": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "list": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "register_read": [_POINTER, c_void_p, c_size_t, DataArrived, c_void_p],
            "mlst": [_POINTER, c_char_p, _POINTER, POINTER(c_void_p), POINTER(c_size_t), Completed, c_void_p],
            "size": [_POINTER, c_char_p, _POINTER, POINTER(c_int64), Completed, c_void_p],
            "cksm": [_POINTER, c_char_p, _POINTER, c_char_p, c_int64, c_int64, c_char_p, Completed, c_void_p],
            "mkdir": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "rmdir": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "delete": [_POINTER, c_char_p, _POINTER, Completed, c_void_p],
            "move": [_POINTER, c_char_p, c_char_p, _POINTER, Completed, c_void_p],
            "abort": [_POINTER],
            "perf_plugin_init": [_POINTER, TransferBegan, MarkerArrived, TransferEnded, c_void_p],
        }
        for name, arguments in prototypes.items():
            function = getattr(client, f"globus_ftp_client_{name}")
            function.argtypes = arguments
            function.restype = c_uint32

    def call(self, name: str, *arguments: object) -> None:
        """Call ``globus_ftp_client_<name>``.

        Raises:
            GlobusError: it was refused.
        """
        result = getattr(self.client, f"globus_ftp_client_{name}")(*arguments)
        if result != 0:
            error = self.common.globus_error_get(result)
            text = self.error_text(error)
            self.common.globus_object_free(error)
            raise GlobusError(text)

    def error_text(self, error: int | None) -> str:
        """The text of an error object, which stays the caller's; lines end in newline only."""
        text = self.common.globus_error_print_friendly(error)
        if not text:
            return "the Globus library gives no reason"
        raw = ctypes.string_at(text)
        self._c.free(text)
        return raw.decode("utf-8", "backslashreplace").replace("\r\n", "\n").strip()

    def free(self, pointer: int | None) -> None:
        """Free memory that the library gave us."""
        self._c.free(pointer)
