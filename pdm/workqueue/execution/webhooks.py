"""Sends the deliveries of webhooks that are due, and tests of webhooks."""

from __future__ import annotations

import base64
import random
import secrets
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

from attrs import Factory, define, field
from standardwebhooks.webhooks import Webhook as Signer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.domain.notifications import DeliveryPolicy, DeliveryState, SendResult, WebhookRecord
from pdm.workqueue.execution.receivers import Receivers
from pdm.workqueue.store import webhooks
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseClosedError
from pdm.workqueue.store.webhooks import DueDelivery
from pdm.workqueue.telemetry.background import Background, DueTimer

#: Seconds until something due is noticed that another daemon has left.
_LOOK_EVERY_S = 5.0
#: Webhooks that are sent to at the same time: of all users, of one.
_SLOTS, _SLOTS_OF_USER = 32, 2
#: A turn of a webhook ends after so many deliveries, or so many seconds, if others wait.
_DELIVERIES_OF_TURN, _TURN_S = 50, 30.0
#: Seconds for which a lease is valid beyond the longest delivery.
_LEASE_MARGIN_S = 30.0
_SECRET_BYTES = 32
_PREFIX = "whsec_"


def new_secret() -> bytes:
    """A secret of a new webhook."""
    return secrets.token_bytes(_SECRET_BYTES)


def secret_text(secret: bytes) -> str:
    """A secret as Standard Webhooks writes it: ``whsec_`` and Base64."""
    return _PREFIX + base64.b64encode(secret).decode("ascii")


def secret_context(user_id: int, uid: str) -> str:
    """What the encrypted secret of a webhook is bound to."""
    return f"secret of webhook {uid} of user {user_id}"


class WebhookBusyError(Exception):
    """A test of one of the user's webhooks is running already."""


@define(eq=False, kw_only=True)
class WebhookSender:
    """Sends deliveries: at least once, those of one job in order.

    Each webhook that has something due gets a slot for a turn, in which its deliveries are sent one after the other.

    Attributes:
        incarnation: under which this daemon leases webhooks.
        jitter: a random number from 0 to 1.
        timer: to be woken when deliveries were queued.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    vault: Vault
    receivers: Receivers
    policy: DeliveryPolicy
    incarnation: str
    jitter: Callable[[], float] = random.random
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "send webhooks", _LOOK_EVERY_S, self._send_due), takes_self=True
        ),
    )
    #: User → webhooks of the user that have a slot.
    _busy: Counter[int] = field(factory=Counter)
    _testing: set[int] = field(factory=set)
    _sending: set[Deferred[SendResult]] = field(factory=set)
    _background: Background = field(factory=Background)
    _stopping: bool = False
    #: Number of deliveries that were not accepted.
    failures: int = field(default=0, init=False)
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self.receivers.start()
        self.timer.start()

    async def stop(self) -> None:
        """Cancel what is being sent, which is sent again later, and end the leases."""
        self._stopping = True
        await self.timer.stop()
        for sending in list(self._sending):
            sending.cancel()
        await self._background.over()
        self.receivers.stop()

    @property
    def _lease_s(self) -> float:
        return self.receivers.timeout_s + _LEASE_MARGIN_S

    async def _send_due(self) -> float:
        free = _SLOTS - self._busy.total()
        if free > 0:
            taken = await self.database.run(
                "claim webhooks",
                webhooks.claim,
                self.incarnation,
                free,
                list(self._busy.elements()),
                _SLOTS_OF_USER,
                self._lease_s,
                self.clock(),
            )
            for webhook in taken:
                self._busy[webhook.user_id] += 1
                self._background.start(f"send to webhook {webhook.id}", self._turn(webhook))
        now = self.clock()
        due = await self.database.read("find the next delivery", webhooks.next_due, now)
        return _LOOK_EVERY_S if due is None else (due - now).total_seconds()

    async def _turn(self, webhook: WebhookRecord) -> None:
        """Send what is due of a webhook."""
        ends_at = self.reactor.seconds() + _TURN_S
        try:
            for _ in range(_DELIVERIES_OF_TURN):
                due = await self.database.run(
                    "next delivery",
                    webhooks.next_delivery,
                    self.incarnation,
                    webhook.id,
                    self._lease_s,
                    self.clock(),
                )
                if due is None or self._stopping or not await self._deliver(due):
                    break
                if self.reactor.seconds() >= ends_at:
                    break
        finally:
            self._busy[webhook.user_id] -= 1
            self._busy += Counter()
            await self.database.store("release a webhook", webhooks.release, self.incarnation, webhook.id, self.clock())
            self.timer.wake()

    async def _deliver(self, due: DueDelivery) -> bool:
        """Try one delivery; returns whether another one may be tried."""
        delivery, webhook = due.delivery, due.webhook
        message_id = f"msg_{webhook.uid}_{delivery.event_id}"
        result = await self._send(webhook, message_id, delivery.body)
        if result is None:
            return False
        self.failures += result.error is not None
        settled = await self.database.store(
            "settle a delivery", webhooks.settle, delivery, result, self.policy, self.jitter(), self.clock()
        )
        if settled.state is DeliveryState.GIVEN_UP:
            self._log.warn(
                "webhook {webhook} of user {user}: event {event} of job {job} is given up after {count} tries: {why}",
                webhook=webhook.id,
                user=webhook.user_id,
                event=delivery.event_id,
                job=delivery.job_id,
                count=delivery.attempts + 1,
                why=result.error,
            )
        if settled.disabled_why is not None:
            self._log.warn(
                "webhook {webhook} of user {user} is disabled: {why}",
                webhook=webhook.id,
                user=webhook.user_id,
                why=settled.disabled_why,
            )
        return settled.disabled_why is None

    async def _send(self, webhook: WebhookRecord, message_id: str, body: str) -> SendResult | None:
        """Sign and send a message; None if the service stops."""
        try:
            secret = self.vault.unseal(webhook.secret, secret_context(webhook.user_id, webhook.uid))
        except VaultError as error:
            return SendResult(error=f"its secret cannot be decrypted: {error}")
        at = datetime.now(UTC)
        headers = {
            "webhook-id": message_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": Signer(secret).sign(message_id, at, body),
        }
        sending = Deferred.fromCoroutine(self.receivers.send(webhook.url, body.encode(), headers))
        self._sending.add(sending)
        try:
            return await sending
        except Exception:
            if self._stopping:
                return None
            raise
        finally:
            self._sending.discard(sending)

    async def test(self, webhook: WebhookRecord, body: str) -> tuple[SendResult, bool]:
        """Send a test message now, and store what came of it.

        Returns:
            The result, and whether the webhook, which was disabled, is enabled again.

        Raises:
            WebhookBusyError: another test of the user runs.
            DatabaseClosedError: the service is stopping.
        """
        if webhook.user_id in self._testing:
            raise WebhookBusyError
        self._testing.add(webhook.user_id)
        try:
            result = await self._send(webhook, f"msg_{webhook.uid}_test_{secrets.token_hex(8)}", body)
            if result is None:
                raise DatabaseClosedError("the service is stopping")
            enabled = await self.database.run(
                "store a test", webhooks.record_test, webhook.id, body, result, self.clock()
            )
        finally:
            self._testing.discard(webhook.user_id)
        return result, enabled
