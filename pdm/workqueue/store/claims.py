"""The right to run elements, from the lease to the verdict: one door to the modules that carry it out."""

from __future__ import annotations

from pdm.workqueue.store.claiming import claim
from pdm.workqueue.store.due import bring_forward, next_due
from pdm.workqueue.store.leases import (
    RELEASED_AT_ONCE,
    Registration,
    Renewal,
    WorkerIdentity,
    end_suspended_sessions,
    register_worker,
    release_expired,
    release_unknown,
    release_worker,
    renew,
    resign,
    running_of,
)
from pdm.workqueue.store.residues import clear_residue, note_begun, residues
from pdm.workqueue.store.room import ClaimLimits
from pdm.workqueue.store.settling import Settled, extend, known_paths, path_mark, settle
from pdm.workqueue.store.steering import (
    HeldRoute,
    Resumed,
    being_steered,
    held_routes,
    held_too_long,
    resume_held,
    steer_on,
)

__all__ = [
    "RELEASED_AT_ONCE",
    "ClaimLimits",
    "HeldRoute",
    "Registration",
    "Renewal",
    "Resumed",
    "Settled",
    "WorkerIdentity",
    "being_steered",
    "bring_forward",
    "claim",
    "clear_residue",
    "end_suspended_sessions",
    "extend",
    "held_routes",
    "held_too_long",
    "known_paths",
    "next_due",
    "note_begun",
    "path_mark",
    "register_worker",
    "release_expired",
    "release_unknown",
    "release_worker",
    "renew",
    "residues",
    "resign",
    "resume_held",
    "running_of",
    "settle",
    "steer_on",
]
