"""What operators do by FTS3's REST API: ban storages and users, and see what runs."""

from __future__ import annotations

from typing import Any

from pdm.workqueue.domain.fts import storage_element
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.domain.subjects import normal_subject
from pdm.workqueue.http.endpoints.sites import actor, lift, log_audit, require_operator, restrict
from pdm.workqueue.http.fts.bans import BANNED_STORAGE, drain_banned, sites_of_storage
from pdm.workqueue.http.fts.calls import FtsAnswer, FtsCall
from pdm.workqueue.http.fts.documents import read_document
from pdm.workqueue.http.fts.jobs import cancel_parts
from pdm.workqueue.http.fts.views import fts_time
from pdm.workqueue.http.problems import ConflictError, InvalidInputError, NotFoundError
from pdm.workqueue.store import fts_bans, users
from pdm.workqueue.store.fts_bans import FtsBan

_LONGEST_STORAGE, _LONGEST_MESSAGE = 255, 500


def _word(values: dict[str, Any], key: str, longest: int) -> str:
    value = values.get(key) or ""
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        raise InvalidInputError(f"{key}: one line of at most {longest} characters is expected")
    return value


async def ban_storage(call: FtsCall) -> FtsAnswer:
    """Ban a storage: its sites are drained, and its jobs cancelled or left to wait; ids of the jobs concerned."""
    require_operator(call.caller)
    values = dict(read_document(call.body))
    given = _word(values, "storage", _LONGEST_STORAGE)
    if not given:
        raise InvalidInputError("Missing storage parameter")
    storage, accepts = storage_element(given), bool(values.get("allow_submit"))
    status = (_word(values, "status", 10) or "cancel").upper()
    if status not in ("CANCEL", "WAIT"):
        raise InvalidInputError("status can only be cancel or wait")
    if accepts and status == "CANCEL":
        raise InvalidInputError("allow_submit and status = CANCEL can not be combined")
    if str(values.get("timeout") or 0) != "0":
        raise InvalidInputError(
            "timeout: jobs that wait for a banned storage do so until it is unbanned, or their own end"
        )
    ban = FtsBan(
        storage,
        "WAIT_AS" if accepts else status,
        _word(values, "message", _LONGEST_MESSAGE),
        actor(call.caller),
        call.api.clock(),
    )
    await call.api.commit(
        "ban a storage",
        fts_bans.ban,
        ban,
        then=lambda _: log_audit(call.api, call.caller, "storage.ban", storage, ban.status),
    )
    concerned = sites_of_storage(call.api, storage)
    await drain_banned(call.api, ban, concerned)
    parts = await call.api.database.read(
        "jobs at a storage", fts_bans.open_parts, [site.id for site in concerned], None
    )
    if status == "CANCEL":
        await cancel_parts(call.api, [number for _, number in parts])
    return FtsAnswer(list(dict.fromkeys(fts_id for fts_id, _ in parts)))


async def unban_storage(call: FtsCall) -> FtsAnswer:
    """End the ban of a storage; its jobs go on."""
    require_operator(call.caller)
    given = call.query().get("storage", "")
    if not given:
        raise InvalidInputError("Missing storage parameter")
    storage, by = storage_element(given), actor(call.caller)

    def then(lifted: bool) -> None:
        if lifted:
            log_audit(call.api, call.caller, "storage.unban", storage)

    await call.api.commit("unban a storage", fts_bans.unban, storage, by, call.api.clock(), then=then)
    for site in sites_of_storage(call.api, storage):
        drained = call.api.site_directory.restriction(RestrictionKind.SITE, site.id)
        if drained is not None and drained.message.startswith(BANNED_STORAGE):
            await lift(call.api, call.caller, RestrictionKind.SITE, site.id)
    return FtsAnswer(b"", 204)


async def list_storages(call: FtsCall) -> FtsAnswer:
    """All banned storages."""
    return FtsAnswer(
        [
            {
                "se": ban.storage,
                "message": ban.message,
                "addition_time": fts_time(ban.since),
                "admin_dn": ban.by.subject,
                "status": ban.status,
                "vo": "*",
            }
            for ban in await call.api.database.read("banned storages", fts_bans.all_bans)
        ]
    )


async def _user_id(call: FtsCall, subject: str) -> int:
    try:
        found = await call.api.database.read("find a user", users.find, normal_subject(subject))
    except ValueError as error:
        raise InvalidInputError(f"user_dn: {error}") from error
    if found is None:
        raise NotFoundError(f"{subject[:200]} has never used this service")
    return int(found.id)


async def ban_user(call: FtsCall) -> FtsAnswer:
    """Ban a user, and cancel the jobs that the user has submitted to the door; their ids."""
    require_operator(call.caller)
    values = dict(read_document(call.body))
    subject = _word(values, "user_dn", 1024)
    if not subject:
        raise InvalidInputError("Missing dn parameter")
    user_id = await _user_id(call, subject)
    if user_id == call.caller.user_id:
        raise ConflictError("The user tried to ban (her|his)self")
    words = _word(values, "message", _LONGEST_MESSAGE) or "banned by an operator of FTS"
    await restrict(call.api, call.caller, RestrictionKind.USER, user_id, words)
    parts = await call.api.database.read("jobs of a user", fts_bans.open_parts, (), user_id)
    await cancel_parts(call.api, [number for _, number in parts])
    return FtsAnswer(list(dict.fromkeys(fts_id for fts_id, _ in parts)))


async def unban_user(call: FtsCall) -> FtsAnswer:
    """End the ban of a user."""
    require_operator(call.caller)
    subject = call.query().get("user_dn", "")
    if not subject:
        raise InvalidInputError("Missing user_dn parameter")
    await lift(call.api, call.caller, RestrictionKind.USER, await _user_id(call, subject))
    return FtsAnswer(b"", 204)


async def list_users(call: FtsCall) -> FtsAnswer:
    """All banned users."""
    require_operator(call.caller)
    api = call.api
    banned = [
        restriction
        for number in api.site_directory.restricted(RestrictionKind.USER)
        if (restriction := api.site_directory.restriction(RestrictionKind.USER, number)) is not None
    ]
    subjects = await api.database.read("subjects", users.subjects, [each.number for each in banned])
    return FtsAnswer(
        [
            {
                "dn": subjects.get(each.number, ""),
                "message": each.message,
                "addition_time": fts_time(each.since),
                "admin_dn": each.by,
            }
            for each in banned
        ]
    )


async def show_hosts(call: FtsCall) -> FtsAnswer:
    """How many files all daemons copy now, and how many come from tape, under the name of the service."""
    require_operator(call.caller)
    running = await call.api.database.read("running elements", fts_bans.running_elements)
    staged = await call.api.database.read("elements that are staged", fts_bans.staged_elements)
    return FtsAnswer({call.api.service_name(): {"active": running, "staging": staged}})
