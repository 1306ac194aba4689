"""Endpoints of webhooks and mail."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from msgspec import UNSET

from pdm.workqueue.domain.notifications import (
    DeliveryRecord,
    DigestPer,
    MailSubscription,
    NewWebhook,
    Notify,
    WebhookRecord,
    check_address,
)
from pdm.workqueue.execution.mail import CODE_LIFETIME_S, code_digest, new_code
from pdm.workqueue.execution.webhooks import WebhookBusyError, new_secret, secret_context, secret_text
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import endpoint
from pdm.workqueue.http.problems import ConflictError, IdempotencyKeyReusedError, InvalidInputError, NotFoundError
from pdm.workqueue.http.views import whole_seconds
from pdm.workqueue.store import mail, webhooks
from pdm.workqueue.store.idempotency import IdempotencyConflictError, IdempotencyKey
from pdm.workqueue.store.mail import TooManyCodesError
from pdm.workqueue.store.webhooks import TooManyWebhooksError
from pdm.workqueue.wire.events import (
    DeliveryView,
    MailBody,
    MailCodeBody,
    MailView,
    NewWebhookBody,
    WebhookTestView,
    WebhookView,
)
from pdm.workqueue.wire.responses import timestamp_text


@endpoint("GET", "/webhooks", summary="All webhooks of the caller", result=list[WebhookView])
async def list_webhooks(api: ApiContext, caller: Caller) -> list[WebhookView]:
    """In order of their numbers."""
    found = await api.database.read("list webhooks", webhooks.of_user, caller.user_id)
    return [_view(each) for each in found]


@endpoint(
    "POST",
    "/webhooks",
    summary="Create a webhook",
    body=NewWebhookBody,
    result=WebhookView,
    status=201,
    errors=(InvalidInputError, NotFoundError, ConflictError, IdempotencyKeyReusedError),
)
async def create_webhook(
    api: ApiContext, caller: Caller, body: NewWebhookBody, key: IdempotencyKey | None
) -> WebhookView:
    """Sends the events of the caller's jobs, and of sites that the caller sees, to a URL from now on.

    Messages are signed by the rules of Standard Webhooks with the ``secret`` of the answer, which is not shown again.
    Each event is sent until it is accepted, at most for a day; those of one job in order. An event may come twice.
    """
    try:
        url = api.notifications.webhooks.receivers.addresses.check_url(body.url)
    except ValueError as error:
        raise InvalidInputError(str(error), "$.url") from error
    if body.job is not None:
        await api.job(body.job, caller.user_id)
    secret, uid = new_secret(), secrets.token_hex(8)
    sealed = api.vault.seal(secret, secret_context(caller.user_id, uid))
    kinds = tuple(dict.fromkeys(body.kinds))
    new = NewWebhook(user_id=caller.user_id, uid=uid, url=url, kinds=kinds, job_id=body.job, secret=sealed)
    try:
        record = await api.database.run("create a webhook", webhooks.create, new, key, api.clock())
    except IdempotencyConflictError as error:
        raise IdempotencyKeyReusedError from error
    except TooManyWebhooksError as error:
        raise ConflictError(str(error)) from error
    api.notifications.listeners_changed()
    # A repeated request gets the secret of the first one, whose answer may have been lost.
    shown = api.vault.unseal(record.secret, secret_context(record.user_id, record.uid))
    return _view(record, secret=secret_text(shown))


@endpoint("GET", "/webhooks/{webhook_id}", summary="One webhook", result=WebhookView, errors=(NotFoundError,))
async def get_webhook(api: ApiContext, caller: Caller, webhook_id: int) -> WebhookView:
    """With its last 100 deliveries."""
    record, found = await api.database.read("fetch a webhook", transactions.fetch_webhook, webhook_id, caller.user_id)
    return _view(record, deliveries=found)


@endpoint(
    "POST",
    "/webhooks/{webhook_id}/test",
    summary="Send a test message to a webhook",
    result=WebhookTestView,
    errors=(NotFoundError, ConflictError),
)
async def check_webhook(
    api: ApiContext, caller: Caller, webhook_id: int, key: IdempotencyKey | None
) -> WebhookTestView:
    """Sends a message of type ``test``, signed as all are, and waits for the answer.

    If it is accepted, a webhook that was disabled is enabled again.
    """
    record, _ = await api.database.read("fetch a webhook", transactions.fetch_webhook, webhook_id, caller.user_id)
    data = {"webhook": record.id}
    body = json.dumps({"type": "test", "timestamp": timestamp_text(api.clock()), "data": data}, separators=(",", ":"))
    try:
        result, enabled = await api.notifications.webhooks.test(record, body)
    except WebhookBusyError:
        raise ConflictError("a test of a webhook of yours is running already: wait until it ends") from None
    if enabled:
        api.notifications.listeners_changed()
    return WebhookTestView(
        accepted=result.error is None,
        status=result.status,
        error=result.error,
        seconds=round(result.elapsed_s, 3),
        enabled=enabled,
    )


@endpoint(
    "DELETE", "/webhooks/{webhook_id}", summary="Remove a webhook", result=None, status=204, errors=(NotFoundError,)
)
async def delete_webhook(api: ApiContext, caller: Caller, webhook_id: int) -> None:
    """With its deliveries; what waits is not sent any more."""
    await api.database.run("remove a webhook", transactions.remove_webhook, webhook_id, caller.user_id)


@endpoint("GET", "/mail", summary="What is mailed to the caller", result=MailView)
async def get_mail(api: ApiContext, caller: Caller) -> MailView:
    """Without an address nothing is."""
    return _mail_view(await api.database.read("fetch a mail address", mail.fetch, caller.user_id))


@endpoint("PUT", "/mail", summary="Get mail", body=MailBody, result=MailView, errors=(InvalidInputError, ConflictError))
async def set_mail(api: ApiContext, caller: Caller, body: MailBody) -> MailView:
    """Set the caller's address, and what is mailed to it.

    A code is sent to a new address first; nothing else is until it was confirmed by ``POST /mail/confirm``.
    """
    if api.notifications.mail.smarthost is None:
        raise ConflictError("this service sends no mail: its operator has set no smarthost")
    try:
        address = check_address(body.address)
    except ValueError as error:
        raise InvalidInputError(str(error), "$.address") from error
    code = new_code()
    notify = {Notify(each) for each in body.notify}
    digest = code_digest(caller.user_id, code)

    def then(_record: MailSubscription) -> None:
        api.notifications.mail.timer.wake()

    try:
        record = await api.commit(
            "set a mail address",
            mail.subscribe,
            caller.user_id,
            address,
            notify,
            DigestPer(body.per),
            code,
            digest,
            api.clock(),
            then=then,
        )
    except TooManyCodesError as error:
        raise ConflictError(str(error)) from error
    return _mail_view(record)


@endpoint(
    "POST",
    "/mail/confirm",
    summary="Confirm a mail address",
    body=MailCodeBody,
    result=MailView,
    errors=(InvalidInputError,),
)
async def confirm_mail(api: ApiContext, caller: Caller, body: MailCodeBody, key: IdempotencyKey | None) -> MailView:
    """By the code that was sent to it; valid for a day, and for five tries."""
    digest = code_digest(caller.user_id, body.code)
    user_id = caller.user_id
    if not await api.database.run("confirm an address", mail.confirm, user_id, digest, CODE_LIFETIME_S, api.clock()):
        raise InvalidInputError("this is not the code that was sent, or it is too old: set the address again", "$.code")
    api.notifications.listeners_changed()
    return _mail_view(await api.database.read("fetch a mail address", mail.fetch, caller.user_id))


@endpoint("DELETE", "/mail", summary="Get no more mail", result=None, status=204)
async def delete_mail(api: ApiContext, caller: Caller) -> None:
    """The address is forgotten. It is no error if there is none."""
    await api.database.run("remove a mail address", mail.unsubscribe, caller.user_id)


def _view(
    record: WebhookRecord, *, secret: str | None = None, deliveries: Sequence[DeliveryRecord] | None = None
) -> WebhookView:
    return WebhookView(
        id=record.id,
        url=record.url,
        kinds=list(record.kinds),
        job=record.job_id,
        created_at=record.created_at.replace(microsecond=0),
        waiting=record.waiting or 0,
        failing_since=whole_seconds(record.failing_since),
        disabled_at=whole_seconds(record.disabled_at),
        disabled_why=record.disabled_why,
        secret=UNSET if secret is None else secret,
        deliveries=UNSET if deliveries is None else [_delivery_view(each) for each in deliveries],
    )


def _delivery_view(record: DeliveryRecord) -> DeliveryView:
    return DeliveryView(
        id=record.id,
        event=record.event_id,
        kind=record.kind,
        job=record.job_id,
        state=record.state.value,
        created_at=record.created_at.replace(microsecond=0),
        attempts=record.attempts,
        next_try=whole_seconds(record.due_at),
        ended_at=whole_seconds(record.ended_at),
        status=record.status,
        error=record.error,
    )


def _mail_view(record: MailSubscription | None) -> MailView:
    if record is None or not record.address:
        return MailView(address=None, confirmed=False, notify=[], per="job", sent_at=None, error=None)
    return MailView(
        address=record.address,
        confirmed=record.confirmed_at is not None,
        notify=[each.value for each in record.notify],
        per="day" if record.per is DigestPer.DAY else "job",
        sent_at=whole_seconds(record.sent_at),
        error=record.error,
    )
