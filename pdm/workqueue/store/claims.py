"""The right to run elements, from the lease to the verdict: one door to the modules that carry it out."""

from __future__ import annotations

from pdm.workqueue.store.claiming import claim
from pdm.workqueue.store.due import next_due
from pdm.workqueue.store.leases import Renewal, register_worker, release_expired, release_worker, renew
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
    "ClaimLimits",
    "HeldRoute",
    "Renewal",
    "Resumed",
    "Settled",
    "being_steered",
    "claim",
    "clear_residue",
    "extend",
    "held_routes",
    "held_too_long",
    "known_paths",
    "next_due",
    "note_begun",
    "path_mark",
    "register_worker",
    "release_expired",
    "release_worker",
    "renew",
    "residues",
    "resume_held",
    "settle",
    "steer_on",
]
