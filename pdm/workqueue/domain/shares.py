"""Shares of the limits of streams among nodes, such that all nodes together never exceed a limit.

Each node publishes its share (`NodeShare`) in the database. The allowances of all nodes for a key never add up to more
than its limit, so that a node needs to ask no other one before it starts a stream:

- A node reduces its own share by itself (`reduced`): first what it starts by, then what it publishes. It never
  publishes less than what it runs.
- A node increases its share (`increased`) in a transaction that excludes those of other nodes, by what the published
  shares of the others leave. It starts streams by it once that transaction is committed.

A limit that no node has named is divided into as many equal parts as there are nodes; the remainder belongs to no node.
Keys whose demand is uneven are named, with the number of streams that the node holds. A new node has no part until each
other node has published that it counts the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from attrs import evolve, field, frozen

from pdm.workqueue.domain.limits import LimitKey, LimitKind, Route

#: Keys that a node names at most: its share is published as a whole.
MOST_NAMED = 3000

LimitOf = Callable[[LimitKey], int]


@frozen(kw_only=True)
class NodeShare:
    """What a node may run of the limits of all nodes.

    Attributes:
        most: streams that it can run at once.
        parts: number of parts of a limit of which it has one; None if it has no part yet.
        held: streams of named keys.
        wanted: streams that it could run of keys for which it has too small a share.
    """

    most: int
    parts: int | None = None
    held: Mapping[LimitKey, int] = field(factory=dict)
    wanted: Mapping[LimitKey, int] = field(factory=dict)

    def part(self, limit: int) -> int:
        """Streams of a limit whose key is not named."""
        return min(limit // self.parts, self.most) if self.parts else 0

    def allowance(self, key: LimitKey, limit: int) -> int:
        """Streams that it may run of a key."""
        held = self.held.get(key)
        return self.part(limit) if held is None else min(held, limit, self.most)


def fair_part(limit: int, own: int, others: Sequence[int], *, first: int = 0) -> int:
    """How many streams of a limit are this node's, by max-min fairness.

    Args:
        own: streams that this node could run.
        others: the same of the other nodes.
        first: how many of the other nodes come before this one where not all can have one more.
    """
    left, sharers = limit, 1 + len(others)
    for demand in sorted(others):
        if demand > left // sharers:
            break
        left -= demand
        sharers -= 1
    whole, more = divmod(max(left, 0), sharers)
    return min(own, whole + (1 if first < more else 0))


def reduced(
    own: NodeShare,
    others: Sequence[NodeShare],
    running: Mapping[LimitKey, int],
    demand: Mapping[LimitKey, int],
    limit_of: LimitOf,
) -> tuple[NodeShare, Mapping[LimitKey, int]]:
    """The share of this node after it has given back what it does not need, or what is a fair part of others.

    Args:
        own: present share.
        others: of all other nodes with a lease.
        running: streams that run here.
        demand: streams that this node could run.

    Returns:
        The share to publish; and of keys of which more streams run than this node should have, how many it should have.
        The latter is to be used at once: none of these streams is replaced until enough have ended.
    """
    parts = own.parts if own.parts is None else max(own.parts, 1 + len(others))
    after = evolve(own, parts=parts)
    contested = {key for other in others for key in other.wanted}
    named = contested.union(own.held, *(other.held for other in others))
    held: dict[LimitKey, int] = {}
    goals: dict[LimitKey, int] = {}
    for key in named.union(running):
        limit = limit_of(key)
        before, part, runs = own.allowance(key, limit), after.part(limit), running.get(key, 0)
        allowances = [other.allowance(key, limit) for other in others]
        goal = before if key in own.held else min(before, part)
        if key in contested or before + sum(allowances) > limit:
            demands = [other.wanted.get(key, allowed) for other, allowed in zip(others, allowances, strict=True)]
            goal = min(goal, fair_part(limit, demand.get(key, 0), demands, first=_before(before, allowances)))
        elif key in own.held and not demand.get(key, 0):
            goal = min(goal, part)
        kept = min(max(goal, runs), before)
        if kept > goal:
            goals[key] = goal
        if kept != part:
            held[key] = kept
    if len(held) > MOST_NAMED:
        # Nothing is given back, and no new node is counted, until fewer keys are in use.
        return own, {}
    return evolve(after, held=held), goals


def increased(own: NodeShare, others: Sequence[NodeShare], busy: Collection[LimitKey], limit_of: LimitOf) -> NodeShare:
    """The share of this node after it has taken what others leave, of keys that it wants more of.

    Args:
        own: present share, as it is published now, with what is wanted.
        others: of all other nodes with a lease, as they are published now.
        busy: keys of which this node runs or has claimed something.
    """
    members = 1 + len(others)
    is_counted = all(other.parts is None or other.parts >= members for other in others)
    after = evolve(own, parts=members) if is_counted else own
    contested = {key for other in others for key in other.wanted}
    held: dict[LimitKey, int] = {}
    for key in set(own.held).union(own.wanted, *(other.held for other in others)):
        limit = limit_of(key)
        before, part = own.allowance(key, limit), after.part(limit)
        allowances = [other.allowance(key, limit) for other in others]
        left = limit - sum(allowances)
        if key in own.wanted:
            demands = [other.wanted.get(key, allowed) for other, allowed in zip(others, allowances, strict=True)]
            goal = fair_part(limit, own.wanted[key], demands, first=_before(before, allowances))
        elif key in contested or (key in own.held and key in busy):
            goal = before
        else:
            goal = part
        now = max(before, min(goal, left))
        if now != part:
            held[key] = now
    if len(held) > MOST_NAMED:
        return own
    return evolve(after, held=held)


def _before(own: int, others: Sequence[int]) -> int:
    """How many nodes hold more than this one: they keep it, so that a share does not change hands for nothing."""
    return sum(1 for held in others if held > own)


_LETTERS = {
    LimitKind.ROUTE: "r",
    LimitKind.INTO: "i",
    LimitKind.OUT_OF: "o",
    LimitKind.USER: "u",
    LimitKind.JOB: "j",
}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}


def key_text(key: LimitKey) -> str:
    """A key as it is published: ``i3``, ``r1.2``."""
    kind, named = key
    if isinstance(named, Route):
        named = f"{named.source}" if named.destination is None else f"{named.source}.{named.destination}"
    return f"{_LETTERS[kind]}{named}"


def key_of(text: str) -> LimitKey:
    """The key of a text of `key_text`.

    Raises:
        ValueError: it is none.
    """
    kind = _KINDS.get(text[:1])
    source, _, destination = text[1:].partition(".")
    if kind is None:
        raise ValueError(f"{text!r} is no key of a limit")
    if kind is LimitKind.ROUTE:
        return kind, Route(int(source), int(destination) if destination else None)
    return kind, int(source)
