"""Events become deliveries of webhooks, and notices of mail."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime

from attrs import Factory, define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pdm.workqueue.execution.mail import MailSender
from pdm.workqueue.execution.webhooks import WebhookSender
from pdm.workqueue.store import notifications
from pdm.workqueue.store.database import Database
from pdm.workqueue.telemetry.background import DueTimer

#: Seconds until events are noticed that another daemon has written, or webhooks that it has stored.
_LOOK_EVERY_S = 2.0
#: Seconds from an event of this daemon until it is entered: events of that time are entered together.
_COLLECT_S = 0.1
#: The position is stored at least after so many events that concern nothing.
_UNSAVED = 5000


@define(eq=False, kw_only=True)
class Notifications:
    """Enters events for webhooks and mail, and sends both.

    Attributes:
        file_sites: numbers of the sites in the configuration.
    """

    reactor: IReactorTime
    database: Database
    clock: Callable[[], datetime]
    file_sites: Callable[[], Collection[int]]
    webhooks: WebhookSender
    mail: MailSender
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "enter events", _LOOK_EVERY_S, self._enter_new), takes_self=True
        ),
    )
    #: The last event that was read; None before the first.
    _position: int | None = None
    _unsaved: int = 0
    _woken: bool = False
    #: Whether anybody had a webhook or mail at the latest look: if not, an event is worth no look of its own.
    _has_listeners: bool = True
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        self.timer.start()
        self.webhooks.start()
        self.mail.start()

    async def stop(self) -> None:
        await self.timer.stop()
        await self.mail.stop()
        await self.webhooks.stop()
        if self._unsaved:
            await self.database.run("store the position", notifications.enter, self._after, (), self.clock())

    def events_written(self) -> None:
        """This daemon has written events."""
        if self._has_listeners and not self._woken:
            self._woken = True
            self.reactor.callLater(_COLLECT_S, self.timer.wake)

    def listeners_changed(self) -> None:
        """This daemon has stored a webhook, enabled one, or confirmed an address for mail."""
        self._has_listeners = True
        self.timer.wake()

    @property
    def _after(self) -> int:
        assert self._position is not None, "read first"
        return self._position

    async def _enter_new(self) -> float:
        self._woken = False
        if self._position is None:
            self._position = await self.database.read("find the position", notifications.position)
        more = True
        while more:
            wanted = await self.database.read("read events", notifications.find_wanted, self._after, self.file_sites())
            more, self._has_listeners = wanted.more, wanted.has_listeners
            if wanted.concerns or self._unsaved >= _UNSAVED:
                more = await self._enter()
            else:
                self._unsaved += wanted.count
                self._position = wanted.last
        return _LOOK_EVERY_S

    async def _enter(self) -> bool:
        """Enter the next events; returns whether there are more."""
        entered = await self.database.run(
            "enter events", notifications.enter, self._after, self.file_sites(), self.clock()
        )
        self._position, self._unsaved = entered.last, 0
        for number in entered.disabled:
            self._log.warn("webhook {webhook} is disabled: too many events wait for it", webhook=number)
        if entered.deliveries:
            self.webhooks.timer.wake()
        if entered.notices:
            self.mail.timer.wake()
        return entered.more
