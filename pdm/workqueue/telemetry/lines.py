"""Text that is safe in a log: one line stays one line, and no secret gets in."""

from __future__ import annotations

import re

#: A pile of text is cut before the patterns below look at it, so that a hostile one costs little.
LONGEST_TEXT = 64 * 1024

# A key that is cut off before its END is still a key, hence the second way to end.
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
)
_PASSWORD_IN_URL = re.compile(r"(://[^/\s:@]{0,256}):[^/\s@]{1,1024}@")
_BEARER = re.compile(r"(?i)\b(bearer|authz=bearer%20)[ ]?[A-Za-z0-9._~+/=-]{8,}")

#: Characters that could move a terminal's cursor, end a line or turn its direction.
_CONTROL = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROL} | {
    0x09: "\\t",
    0x0A: "\\n",
    0x0D: "\\r",
}


def redacted(text: str) -> str:
    """The text without private keys, passwords in URLs and bearer tokens."""
    if "PRIVATE KEY" in text:
        text = _PRIVATE_KEY.sub("[private key left out]", text)
    if "@" in text and "://" in text:
        text = _PASSWORD_IN_URL.sub(r"\1:***@", text)
    if "earer" in text or "EARER" in text:
        text = _BEARER.sub(r"\1 ***", text)
    return text


def escaped(text: str) -> str:
    """The text as one line that can be shown anywhere: control characters and line ends are spelled out."""
    if text.isprintable():
        return text
    # Half a surrogate pair has no UTF-8 form; spelled out, it cannot fail later where the line is written.
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode("utf-8")


def bounded(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, cut after ``longest`` characters with a note of how many went."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}... ({len(text) - longest} characters left out)"
