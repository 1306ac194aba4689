"""Sends digests to users by mail, through the smarthost of the configuration."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from io import BytesIO
from typing import Any

from attrs import Factory, define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.logger import Logger
from twisted.mail.smtp import ESMTPSenderFactory, SMTPClientError, SMTPDeliveryError, SMTPProtocolError
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.web.iweb import IPolicyForHTTPS

from pdm.workqueue.domain.notifications import MailNotice, Notify
from pdm.workqueue.store import mail
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.mail import DueMail
from pdm.workqueue.telemetry.background import DueTimer

#: Seconds until a mail is noticed that another daemon has left; while the smarthost is away.
_LOOK_EVERY_S = 20.0
#: Mails that are claimed at once, and seconds for one.
_AT_ONCE, _TIMEOUT_S, _LEASE_S = 4, 60.0, 300.0
#: Seconds until a mail is tried again that the smarthost has not taken; doubles with each try, up to the second number.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0
_GIVE_UP = timedelta(days=1)
#: Seconds for which a confirmation code is valid, and its length in bytes.
CODE_LIFETIME_S = 86400.0
_CODE_BYTES = 5
_WITH_LF = SMTP.clone(linesep="\n")
#: Jobs that a mail lists.
_MOST_LISTED = 100


def new_code() -> str:
    """A code that confirms an address."""
    return secrets.token_hex(_CODE_BYTES)


def code_digest(user_id: int, code: str) -> str:
    """What is stored of a code."""
    return hashlib.sha256(f"{user_id} {code.strip().lower()}".encode()).hexdigest()


@frozen(kw_only=True)
class Smarthost:
    """The server that takes mail.

    Attributes:
        tls: ``starttls``, ``tls`` (from the first byte) or ``none``.
        policy: verifies its certificate.
        user: None for no authentication.
    """

    host: str
    port: int
    sender: str
    tls: str
    policy: IPolicyForHTTPS
    user: str | None = None
    password: str | None = field(default=None, repr=False)


class MailRefusedError(Exception):
    """The smarthost has not taken a mail.

    Attributes:
        final: a later try makes no sense.
        away: the smarthost cannot be used at all.
    """

    def __init__(self, text: str, *, final: bool, away: bool) -> None:
        super().__init__(text)
        self.final = final
        self.away = away


@define(eq=False, kw_only=True)
class MailSender:
    """Sends the mail that is due: for each user one at a time, with all that is to be said by then.

    Attributes:
        smarthost: None if the service sends no mail.
        incarnation: under which this daemon leases users.
        timer: to be woken when notices were entered.
    """

    reactor: Any
    database: Database
    clock: Callable[[], datetime]
    smarthost: Smarthost | None
    incarnation: str
    timer: DueTimer = field(
        init=False,
        default=Factory(
            lambda self: DueTimer(self.reactor, "send mail", _LOOK_EVERY_S, self._send_due), takes_self=True
        ),
    )
    _is_away: bool = False
    _stopping: bool = False
    _sending: Deferred[None] | None = None
    _log: Logger = field(factory=Logger)

    def start(self) -> None:
        if self.smarthost is not None:
            self.timer.start()

    async def stop(self) -> None:
        """Cancel what is being sent, which is sent again after the next start."""
        self._stopping = True
        if self._sending is not None:
            self._sending.cancel()
        await self.timer.stop()

    async def _send_due(self) -> float:
        while not self._stopping:
            now = self.clock()
            claimed = await self.database.run("claim mail", mail.claim, self.incarnation, _AT_ONCE, _LEASE_S, now)
            if not claimed:
                break
            away = False
            for due in claimed:
                # Of those that remain the lease is given back.
                away = await self._send(due) if not away else await self._postpone(due)
            if away:
                return _LOOK_EVERY_S
        due_at = await self.database.read("find the next mail", mail.next_due)
        return _LOOK_EVERY_S if due_at is None else max((due_at - self.clock()).total_seconds(), 0.5)

    async def _postpone(self, due: DueMail) -> bool:
        again_at = self.clock() + timedelta(seconds=_LOOK_EVERY_S)
        await self.database.store("postpone a mail", mail.failed, self.incarnation, due, "not sent yet", again_at)
        return True

    async def _send(self, due: DueMail) -> bool:
        """Send one mail; returns whether the smarthost is away."""
        assert self.smarthost is not None
        try:
            if due.notices:
                await self._transmit(self.smarthost, due)
        except MailRefusedError as error:
            if self._stopping:
                return True
            await self._failed(due, error)
            return error.away
        if self._is_away:
            self._is_away = False
            self._log.info("the smarthost {host} takes mail again", host=self.smarthost.host)
        await self.database.store("store that a mail is sent", mail.sent, self.incarnation, due, self.clock())
        return False

    async def _failed(self, due: DueMail, error: MailRefusedError) -> None:
        assert self.smarthost is not None
        now, failures = self.clock(), due.subscription.failures
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(failures, 10), _LONGEST_PAUSE_S)
        over = error.final or now - due.notices[0].at >= _GIVE_UP
        again_at = None if over else now + timedelta(seconds=pause_s)
        await self.database.store("store that a mail failed", mail.failed, self.incarnation, due, str(error), again_at)
        if error.away and not self._is_away:
            self._is_away = True
            self._log.error("the smarthost {host}: {why}", host=self.smarthost.host, why=str(error))
        elif over:
            self._log.warn("mail to user {user} is given up: {why}", user=due.subscription.user_id, why=str(error))

    async def _transmit(self, smarthost: Smarthost, due: DueMail) -> None:
        """Hand a mail to the smarthost.

        Raises:
            MailRefusedError: it was not accepted.
        """
        # Twisted makes each line end CRLF.
        message = compose(due, smarthost.sender, self.clock()).as_bytes(policy=_WITH_LF)
        creator: IOpenSSLClientConnectionCreator = smarthost.policy.creatorForNetloc(
            smarthost.host.encode("ascii"), smarthost.port
        )
        sending: Deferred[Any] = Deferred()
        factory: Any = ESMTPSenderFactory(
            _encoded(smarthost.user),
            _encoded(smarthost.password),
            smarthost.sender,
            due.subscription.address,
            BytesIO(message),
            sending,
            retries=0,
            timeout=_TIMEOUT_S,
            contextFactory=creator if smarthost.tls == "starttls" else None,
            requireAuthentication=smarthost.user is not None,
            requireTransportSecurity=smarthost.tls != "none",
        )
        factory.noisy = False
        if smarthost.tls == "tls":
            factory = TLSMemoryBIOFactory(creator, True, factory)
            factory.noisy = False
        connector = self.reactor.connectTCP(smarthost.host, smarthost.port, factory, timeout=_TIMEOUT_S)
        self._sending = sending
        sending.addTimeout(_TIMEOUT_S, self.reactor)
        try:
            await sending
        except SMTPClientError as error:
            code = getattr(error, "code", -1)
            # Refusals of the recipient or the message; other errors are of the smarthost, for all mail.
            of_mail = 400 <= code < 600 and _is_of_mail(error)
            text = f"{code} {_printable(getattr(error, 'resp', b''))}" if code > 0 else _printable(str(error).encode())
            raise MailRefusedError(text, final=of_mail and code >= 500, away=not of_mail) from error
        except Exception as error:
            raise MailRefusedError(f"no answer ({type(error).__name__})", final=False, away=True) from error
        finally:
            self._sending = None
            connector.disconnect()


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _is_of_mail(error: SMTPClientError) -> bool:
    """Whether the smarthost has refused a recipient or a message, not the connection or the log-in."""
    return isinstance(error, SMTPDeliveryError | SMTPProtocolError)


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in text.decode("ascii", "replace"))[:300]


# -- text


def compose(due: DueMail, sender: str, now: datetime) -> EmailMessage:
    """The mail that says some notices: nothing in it comes from users or storage servers but the address."""
    message = EmailMessage(policy=SMTP)
    message["From"] = sender
    message["To"] = due.subscription.address
    message["Date"] = format_datetime(now)
    # The same notices have the same id: a mail that is sent twice is shown once.
    told = ",".join(str(notice.id) for notice in due.notices)
    digest = hashlib.sha256(f"{due.subscription.user_id} {told} {due.notices[0].at}".encode()).hexdigest()[:32]
    message["Message-ID"] = f"<{digest}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    codes = [notice for notice in due.notices if notice.what is None]
    if codes:
        message["Subject"] = "PDM Workqueue: confirm your mail address"
        message.set_content(_confirmation(codes[-1].details))
    else:
        message["Subject"] = _subject(due.notices)
        message.set_content(_digest(due.notices))
    return message


def _confirmation(code: str) -> str:
    return (
        "A user of the PDM Workqueue wants to get mail about transfers at this address.\n"
        "If that is you, confirm it within a day:\n\n"
        f"    pdm mail confirm {code}\n\n"
        "If it is not, do nothing: no further mail is sent.\n"
    )


def _subject(notices: Sequence[MailNotice]) -> str:
    if len(notices) == 1:
        return f"PDM Workqueue: job {notices[0].job_id} {_word(notices[0])}"
    counts = dict.fromkeys(("FAILED", "HELD"), 0)
    for notice in notices:
        if (word := _word(notice)) in counts:
            counts[word] += 1
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return f"PDM Workqueue: {len(notices)} jobs" + (f", {', '.join(parts)}" if parts else "")


def _word(notice: MailNotice) -> str:
    return "HELD" if notice.what is Notify.HELD else str(json.loads(notice.details).get("status", "ended"))


def _digest(notices: Sequence[MailNotice]) -> str:
    parts = [_paragraph(notice) for notice in notices[:_MOST_LISTED]]
    if len(notices) > _MOST_LISTED:
        parts.append(f"... and {len(notices) - _MOST_LISTED} more: pdm jobs --order newest\n")
    parts.append("To change what is mailed to you: pdm mail --help\n")
    return "\n".join(parts)


def _paragraph(notice: MailNotice) -> str:
    data = json.loads(notice.details)
    lines = [f"job {notice.job_id}  {_word(notice)}  {notice.at:%Y-%m-%d %H:%M:%S} UTC"]
    if notice.what is Notify.HELD:
        lines += [f"    {data.get('count', 1)} elements wait: {data.get('code', '')}", f"    {data.get('hint', '')}"]
    else:
        counts = [f"{data.get('num_elements', 0)} elements"]
        counts += [
            f"{data[f'num_{word}']} {word}" for word in ("done", "failed", "cancelled") if data.get(f"num_{word}")
        ]
        lines.append(f"    {', '.join(counts)}; {data.get('bytes_done', 0)} of {data.get('bytes_total', 0)} bytes")
        if isinstance(data.get("reason"), dict):
            lines.append(f"    cancelled by the service: {data['reason'].get('code', '')}")
        if data.get("num_failed"):
            lines.append(f"    pdm errors {notice.job_id}    pdm retry {notice.job_id}")
    return "\n".join(lines) + "\n"
