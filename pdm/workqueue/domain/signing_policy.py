r"""Which subjects a certificate authority may sign: signing policies of Globus, namespaces files of the EUGridPMA.

Both kinds of file lie beside the certificate of an authority (``HASH.signing_policy``, ``HASH.namespaces``). Without
them each trusted authority may sign every subject, those of other authorities' users included.

Subjects are compared in the plain slash form that such files use: a ``/`` in a value is not escaped. Two names may have
the same plain form, but a name has only one, so an authority gains no subject by choosing odd values. Only the standard
library is needed: helpers read these files too.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from pdm.workqueue.domain.subjects import SPELLINGS, decoded_bytes

#: ``require`` refuses what an authority without a policy has signed, ``if-present`` applies the policies there are,
#: ``off`` applies none.
PolicyMode = Literal["require", "if-present", "off"]

SIGNING_POLICY, NAMESPACES = ".signing_policy", ".namespaces"
#: Bytes of a file; the largest in use have some thousand.
LONGEST_FILE = 64 * 1024
_MOST_ALTERNATIVES = 64
_MOST_TOKENS = 1000
_LONGEST_SUBJECT = 4096

_TYPE = re.compile(r"(?<=/)[A-Za-z]+(?==)")
_BYTES = re.compile(r"(?:\\x[0-9A-Fa-f]{2})+")
_EACL_TOKEN = re.compile(r"\s+|#.*|'([^']*)'|\"([^\"]*)\"|([^\s#'\"]+)")
_QUOTED = re.compile(r'\s*"([^"]*)"')
_NAMESPACE = re.compile(
    r'TO\s+ISSUER\s*(?:"([^"]*)"|(SELF))\s*(PERMIT|DENY)\s+SUBJECT\s*"([^"]*)"\s*;?', re.IGNORECASE | re.ASCII
)
_CLASSES = {"d": string.digits, "w": string.ascii_letters + string.digits + "_", "s": " \t"}
_REPEAT = re.compile(r"\{(\d{1,3})\}", re.ASCII)


class PolicyError(ValueError):
    """A policy file cannot be understood. The text says in which line, and why."""


@dataclass(frozen=True)
class _Token:
    """One character of a pattern.

    Attributes:
        characters: those that match; None for any.
        inverted: all others match instead.
    """

    characters: frozenset[str] | None
    inverted: bool = False
    optional: bool = False
    repeats: bool = False

    def matches(self, character: str) -> bool:
        return self.characters is None or (character in self.characters) is not self.inverted


_ANY = _Token(None, optional=True, repeats=True)


def _matches(tokens: Sequence[_Token], text: str) -> bool:
    """Match a whole text, in a time bounded by the product of both lengths (no backtracking)."""
    reached = _skipped(tokens, {0})
    for character in text:
        stepped: set[int] = set()
        for at in reached:
            if at < len(tokens) and tokens[at].matches(character):
                stepped.add(at + 1)
                if tokens[at].repeats:
                    stepped.add(at)
        if not stepped:
            return False
        reached = _skipped(tokens, stepped)
    return len(tokens) in reached


def _skipped(tokens: Sequence[_Token], places: set[int]) -> set[int]:
    """The places, and those behind the optional tokens that begin there."""
    for at in sorted(places):
        after = at
        while after < len(tokens) and tokens[after].optional:
            after += 1
            places.add(after)
    return places


@dataclass(frozen=True)
class Statement:
    """What a file says about one authority.

    Attributes:
        issuer: the authority's subject, plain form; None for the authority that the file belongs to.
    """

    issuer: str | None
    permits: bool
    patterns: tuple[tuple[_Token, ...], ...] = field(repr=False)

    def matches(self, subject: str) -> bool:
        """Whether a subject in plain form is one of those."""
        return any(_matches(pattern, subject) for pattern in self.patterns)


@dataclass(frozen=True)
class PolicyFile:
    """A policy file that was read.

    Attributes:
        owners: subjects of the authorities beside which it lies, plain form.
        statements: of the file; none if it is malformed.
        problem: why it is malformed; such a file permits nothing.
    """

    name: str
    owners: frozenset[str]
    statements: tuple[Statement, ...] = ()
    problem: str = ""

    @classmethod
    def read(cls, name: str, content: bytes, owners: Iterable[str]) -> PolicyFile:
        """Parse the content of a file, by the format that the suffix of its name says."""
        if len(content) > LONGEST_FILE:
            return cls(name, frozenset(owners), problem=f"it has more than {LONGEST_FILE} bytes")
        try:
            text = content.decode("utf-8-sig")
            parse = _namespaces if name.endswith(NAMESPACES) else _signing_policy
            return cls(name, frozenset(owners), tuple(parse(text)))
        except UnicodeDecodeError:
            return cls(name, frozenset(owners), problem="it is not UTF-8 text")
        except PolicyError as error:
            return cls(name, frozenset(owners), problem=str(error))

    def about(self, issuer: str) -> list[Statement] | None:
        """The statements about an authority; None if the file does not concern it, empty if it permits nothing."""
        own = issuer in self.owners
        found = [each for each in self.statements if each.issuer == issuer or (each.issuer is None and own)]
        return found if found or own else None


@dataclass(frozen=True)
class PolicyDecision:
    """Whether the authorities of a chain may sign what they have signed.

    Attributes:
        refusal: why not, a sentence; None if they may.
        constrained: whether each signature of the chain is covered by a policy.
    """

    refusal: str | None
    constrained: bool


@dataclass(frozen=True)
class SigningPolicies:
    """All policies beside a set of trusted authorities."""

    files: tuple[PolicyFile, ...] = ()
    mode: PolicyMode = "if-present"

    def problems(self) -> list[str]:
        """The malformed files, a sentence each, for the log."""
        return [
            f"{each.name} is no policy that can be applied: {each.problem};"
            " nothing that its authority has signed is accepted"
            for each in self.files
            if each.problem and self.mode != "off"
        ]

    def covers(self, issuer: str) -> bool:
        """Whether a policy says what an authority may sign."""
        return bool(self._rules((issuer,)))

    def evaluate(self, chain: Sequence[str]) -> PolicyDecision:
        """Compare a verified chain with the policies of its authorities.

        Args:
            chain: subjects in plain form: the end entity (behind all proxies) first, the trusted root last.
        """
        if self.mode == "off":
            return PolicyDecision(None, constrained=False)
        constrained = True
        for at, subject in enumerate(chain[:-1]):
            rules = self._rules(chain[at + 1 :])
            if not rules:
                constrained = False
                if self.mode == "require":
                    return PolicyDecision(
                        f"its authority {_displayed(chain[at + 1])} has no signing policy here", constrained
                    )
            for file, statements in rules:
                if not _permitted(subject, statements):
                    why = f", which is malformed: {file.problem}" if file.problem else ""
                    return PolicyDecision(
                        f"its authority {_displayed(chain[at + 1])} may not sign such a subject, says {file.name}{why}",
                        constrained,
                    )
        return PolicyDecision(None, constrained)

    def _rules(self, issuers: Sequence[str]) -> list[tuple[PolicyFile, list[Statement]]]:
        """What an authority has to obey.

        That is what the files beside it say; else what other files say about it; else what binds the authority above
        it, which must not be able to make an unbound one.

        Args:
            issuers: the authority, and those above it.
        """
        for issuer in issuers:
            found = [(file, said) for file in self.files if (said := file.about(issuer)) is not None]
            own = [each for each in found if issuer in each[0].owners]
            if found:
                return own or found
        return []


def _displayed(subject: str) -> str:
    """A subject out of a certificate for a message: what does not print is shown as a question mark."""
    return "".join(each if each.isprintable() else "?" for each in subject[:300])


def _permitted(subject: str, statements: Sequence[Statement]) -> bool:
    if len(subject) > _LONGEST_SUBJECT:
        return False
    matching = [each.permits for each in statements if each.matches(subject)]
    return bool(matching) and all(matching)


def _normal(text: str) -> str:
    r"""A subject or pattern of a file, with today's names of types, and with characters in place of ``\xC3\xA9``."""
    try:
        text = _BYTES.sub(lambda found: decoded_bytes(found[0]), text)
    except ValueError:
        raise PolicyError("the bytes of a subject are no UTF-8") from None
    return _TYPE.sub(lambda found: SPELLINGS.get(found[0].lower(), found[0]), text)


# -- Globus: EACL


def _signing_policy(text: str) -> Iterator[Statement]:
    """The statements of a signing policy.

    Raises:
        PolicyError: it is malformed.
    """
    issuers: list[str] = []
    right: bool | None = None
    open_since = 0
    for number, line in enumerate(text.splitlines(), 1):
        words = _words(line, number)
        if not words:
            continue
        if len(words) != 3:
            raise PolicyError(f"line {number}: a keyword, a defining authority and a value are expected")
        keyword, authority, value = words
        if keyword == "access_id_CA" and authority == "X509":
            if open_since:
                raise PolicyError(f"line {open_since}: the rights before line {number} have no cond_subjects")
            if right is not None:
                issuers, right = [], None
            issuers.append(_normal(value))
        elif keyword in ("pos_rights", "neg_rights") and (authority, value) == ("globus", "CA:sign") and issuers:
            right, open_since = keyword == "pos_rights", number
        elif keyword == "cond_subjects" and authority == "globus" and right is not None:
            patterns = tuple(_wildcards(_normal(each)) for each in _subjects(value, number))
            open_since = 0
            yield from (Statement(issuer, right, patterns) for issuer in issuers)
        else:
            raise PolicyError(f"line {number}: {keyword[:40]} {authority[:40]} is not expected there")
    if open_since or right is None:
        raise PolicyError(
            f"line {open_since}: the rights have no cond_subjects"
            if open_since
            else "it grants nothing: access_id_CA, pos_rights and cond_subjects are expected"
        )


def _words(line: str, number: int) -> list[str]:
    words, end = [], 0
    while end < len(line):
        found = _EACL_TOKEN.match(line, end)
        if found is None:
            raise PolicyError(f"line {number}: a quotation mark is missing")
        words += [each for each in found.groups() if each is not None]
        end = found.end()
    return words


def _subjects(value: str, number: int) -> list[str]:
    if '"' not in value:
        found = [value.strip()]
    else:
        found, end = [], 0
        while value[end:].strip():
            quoted = _QUOTED.match(value, end)
            if quoted is None:
                raise PolicyError(f"line {number}: subjects in double quotes are expected")
            found.append(quoted[1])
            end = quoted.end()
    if not all(found):
        raise PolicyError(f"line {number}: a subject is empty")
    return found


def _wildcards(pattern: str) -> tuple[_Token, ...]:
    """A pattern of a signing policy: ``*`` is any text, ``?`` one character."""
    kinds: Mapping[str, _Token] = {"*": _ANY, "?": _Token(None)}
    return tuple(kinds.get(each) or _Token(frozenset(each)) for each in pattern)


# -- EUGridPMA: namespaces


def _namespaces(text: str) -> Iterator[Statement]:
    """The statements of a namespaces file.

    Raises:
        PolicyError: it is malformed, or a pattern has more than characters, classes, repetitions and alternatives.
    """
    pending, begun, statements = "", 0, 0
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        begun = begun or number
        pending += " " + bare.removesuffix("\\").strip()
        if bare.endswith("\\"):
            continue
        found = _NAMESPACE.fullmatch(pending.strip())
        if found is None:
            raise PolicyError(f'line {begun}: TO Issuer "NAME" PERMIT (or DENY) Subject "PATTERN" is expected')
        try:
            patterns = _expression(_normal(found[4]).removeprefix("^").removesuffix("$"))
        except PolicyError as error:
            raise PolicyError(f"line {begun}: {error}") from None
        issuer = None if found[2] else _normal(found[1])
        yield Statement(issuer, found[3].upper() == "PERMIT", patterns)
        pending, begun, statements = "", 0, statements + 1
    if pending or not statements:
        raise PolicyError(f"line {begun}: the statement has no end" if pending else "it has no statement")


def _expression(pattern: str) -> tuple[tuple[_Token, ...], ...]:
    """The alternatives of a regular expression."""
    alternatives, end = _alternatives(pattern, 0, depth=0)
    if end != len(pattern):
        raise PolicyError("a bracket is closed that was not opened")
    return tuple(alternatives)


def _alternatives(pattern: str, at: int, depth: int) -> tuple[list[tuple[_Token, ...]], int]:
    if depth > 8:
        raise PolicyError("brackets are nested too deeply")
    done: list[tuple[_Token, ...]] = []
    current: list[tuple[_Token, ...]] = [()]
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            done, current, at = done + current, [()], at + 1
            continue
        if pattern[at] == "(":
            inner, at = _alternatives(pattern, at + 1, depth + 1)
            if at >= len(pattern):
                raise PolicyError("a bracket is not closed")
            at += 1
            if pattern[at : at + 1] in tuple("*+?{"):
                raise PolicyError("a bracket may not be repeated")
        else:
            token, at = _atom(pattern, at)
            tokens, at = _repeated(token, pattern, at)
            inner = [tokens]
        if len(inner) * len(current) + len(done) > _MOST_ALTERNATIVES:
            raise PolicyError("it has too many alternatives")
        current = [before + after for before, after in product(current, inner)]
        if any(len(each) > _MOST_TOKENS for each in current):
            raise PolicyError("it is too long")
    return done + current, at


def _atom(pattern: str, at: int) -> tuple[_Token, int]:
    character = pattern[at]
    if character == ".":
        return _Token(None), at + 1
    if character == "[":
        return _class(pattern, at + 1)
    if character == "\\":
        return _Token(frozenset(_escaped(pattern, at + 1))), at + 2
    if character in "*+?{^$":
        raise PolicyError(f"{character} has no meaning there")
    return _Token(frozenset(character)), at + 1


def _escaped(pattern: str, at: int) -> str:
    character = pattern[at : at + 1]
    if character in _CLASSES:
        return _CLASSES[character]
    if not character or character.isalnum():
        raise PolicyError(f"\\{character} is not supported")
    return character


def _class(pattern: str, at: int) -> tuple[_Token, int]:
    inverted = pattern[at : at + 1] == "^"
    at += inverted
    characters: set[str] = set()
    begin = at
    while at < len(pattern) and (pattern[at] != "]" or at == begin):
        first = _escaped(pattern, at + 1) if pattern[at] == "\\" else pattern[at]
        at += 2 if pattern[at] == "\\" else 1
        last = pattern[at + 1 : at + 2]
        if pattern[at : at + 1] == "-" and last and last not in "]\\":
            if len(first) != 1 or not first <= last or ord(last) - ord(first) > 0x400:
                raise PolicyError(f"{first[:1]}-{last} is no range")
            characters.update(map(chr, range(ord(first), ord(last) + 1)))
            at += 2
        else:
            characters.update(first)
    if at >= len(pattern):
        raise PolicyError("a character class is not closed")
    return _Token(frozenset(characters), inverted), at + 1


def _repeated(token: _Token, pattern: str, at: int) -> tuple[tuple[_Token, ...], int]:
    sign = pattern[at : at + 1]
    if sign in ("*", "+", "?"):
        if pattern[at + 1 : at + 2] in tuple("*+?{"):
            raise PolicyError("a repetition is repeated")
        changed = _Token(token.characters, token.inverted, optional=sign in "*?", repeats=sign in "*+")
        return (changed,), at + 1
    if sign == "{":
        found = _REPEAT.match(pattern, at)
        if found is None:
            raise PolicyError("only {N} is supported of such repetitions")
        return (token,) * int(found[1]), found.end()
    return (token,), at
