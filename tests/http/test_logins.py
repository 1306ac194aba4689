"""Logins at token issuers: approved by a code, renewed in time, ended in words; nothing of an issuer is trusted."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.execution.credentials import CredentialUnusableError
from pdm.workqueue.store import oidc_logins
from tests.http.service import Certificates, Service, running
from tests.support.issuer import Issuer

reactor: Any = _reactor
TOKEN = CredentialKind.TOKEN
ensure = pytest_twisted.ensureDeferred
_HOUR, _LONG = timedelta(minutes=56), timedelta(hours=2)


@pytest.fixture(scope="module")
def service(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("logins")
    section = "[oidc]\nallowed = 127.0.0.0/8\n    ::1\nca = trust\ntimeout = 1s\n"
    yield from running(Service(directory, certificates, configuration=section))


@pytest.fixture
def issuer(certificates: Certificates, service: Service) -> Iterator[Issuer]:
    made = Issuer()
    made.listen(certificates.host)
    yield made
    service.skip[0] = timedelta()
    pytest_twisted.blockon(Deferred.fromCoroutine(made.close()))


class Login:
    """A user's login at a site with the issuer."""

    def __init__(self, service: Service, user: str, site: int) -> None:
        self.service, self.user, self.site = service, user, site

    async def ask(self, method: str, status: int = 200) -> Any:
        answer = await self.service.call(self.user, method, f"/sites/{self.site}/login")
        assert answer.status == status, answer.body
        return answer.json if answer.body else None

    async def log_in(self) -> Any:
        begun = await self.ask("POST", 201)
        assert begun["state"] == "waiting"
        self.service.skip[0] += timedelta(seconds=begun["interval"])
        return await self.ask("PUT")

    async def renew(self, after: timedelta = _HOUR) -> Any:
        """Let time pass, and the service renew what is due; returns the login."""
        self.service.skip[0] += after
        self.service.assembly.logins.timer.wake()
        # Until the timer has nothing to do.
        while self.service.assembly.logins.timer._attending:
            await deferLater(reactor, 0.01)
        return await self.ask("GET")

    async def token(self) -> dict[str, Any]:
        """The claims of the token that a helper would get."""
        credentials = self.service.assembly.executor.credentials
        user_id = await self.service.user_id(self.user)
        usable = await credentials.usable(user_id, TOKEN, {self.site}, self.service.now())
        text = usable.sites[self.site].path.read_text()
        credentials.release(usable.fingerprint)
        credentials.remove_unused(usable.fingerprint)
        found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text.split(".")[1] + "=="))
        return found

    async def unusable(self) -> CredentialUnusableError:
        with pytest.raises(CredentialUnusableError) as caught:
            await self.token()
        return caught.value


async def made(service: Service, issuer: Issuer, user: str, **oidc: Any) -> Login:
    body = {
        "name": user,
        "public": True,
        "endpoints": {"HTTPS": "https://dav.example.org", "DUMMY": "dummy://a"},
        "oidc": {"issuer": issuer.url, "client_id": "pdm", **oidc},
    }
    answer = await service.call("operator", "POST", "/sites", body)
    assert answer.status == 201, answer.body
    assert "a secret" not in answer.body.decode()
    return Login(service, user, int(answer.json["id"]))


@ensure
async def test_a_user_logs_in_by_a_code(service: Service, issuer: Issuer) -> None:
    issuer.approved = False
    login = await made(service, issuer, "device", client_secret="a secret", scope="offline_access storage.read:/")
    begun = await login.ask("POST", 201)
    assert (begun["state"], begun["user_code"]) == ("waiting", "ABCD-EFGH")
    assert begun["verification_uri"] == f"{issuer.url}/enter"
    assert await login.ask("POST", 201) == begun, "the same code again"
    (asked,) = issuer.forms("/vo/device")
    assert asked["scope"] == "offline_access storage.read:/"
    assert asked["authorization"] == "Basic " + base64.b64encode(b"pdm:a+secret").decode()
    assert (await login.ask("PUT"))["state"] == "waiting"
    assert issuer.forms("/vo/token") == [], "not before the interval"
    service.skip[0] += timedelta(seconds=5)
    assert (await login.ask("PUT"))["interval"] == 5
    issuer.slow = 1
    service.skip[0] += timedelta(seconds=5)
    assert (await login.ask("PUT"))["interval"] == 10
    issuer.approved = True
    service.skip[0] += timedelta(seconds=5)
    assert (await login.ask("PUT"))["state"] == "waiting", "not asked before the longer interval"
    assert len(issuer.forms("/vo/token")) == 2
    job = await service.submit(login.user, src_siteid=login.site)
    (token,) = await service.claim(job["id"])
    failure = AttemptFailure(FailureScope.SERVICE, FailureCode.CREDENTIAL_MISSING, "there is no token")
    await service.settle(token, JobStatus.HELD, failure, counts=False)
    service.skip[0] += timedelta(seconds=5)
    done = await login.ask("PUT")
    assert (done["state"], done["subject"], done["user_code"]) == ("active", f"alice at {issuer.url}", None)
    assert (await login.token())["sub"] == "alice"
    assert (await service.job(job["id"])).counters.held == 0, "what was held resumes"
    assert (await service.call("device", "GET", "/logins")).json == [done]
    (listed,) = (await service.call("device", "GET", "/credentials")).json
    assert (listed["kind"], listed["site"], listed["subject"]) == ("token", login.site, done["subject"])
    assert (await service.call("operator", "GET", "/logins")).json == []
    page = (await service.browse("device", "/web/credentials")).body.decode()
    assert "pdm login device --oidc" in page
    assert issuer.url in page
    # A token by hand would be replaced at the next renewal.
    by_hand = {"kind": "token", "secret": "abc", "site": login.site}
    assert (await service.call("device", "POST", "/credentials", by_hand)).status == 409
    (refresh,) = issuer.valid
    await login.ask("DELETE", 204)
    while issuer.valid:
        await deferLater(reactor, 0.01)
    assert issuer.forms("/vo/revoke")[0]["token"] == refresh
    assert (await service.call("device", "GET", "/credentials")).json == []
    assert await login.ask("GET") is None
    await login.ask("DELETE", 204)
    await login.ask("PUT", 409)


@pytest.mark.parametrize("after", ["refused", "late"])
@ensure
async def test_a_login_that_is_not_approved_ends(service: Service, issuer: Issuer, after: str) -> None:
    issuer.approved = None if after == "refused" else False
    login = await made(service, issuer, after)
    await login.ask("POST", 201)
    service.skip[0] += timedelta(seconds=5 if after == "refused" else 601)
    detail = (await login.ask("PUT", 409))["detail"]
    assert ("was refused at the issuer" if after == "refused" else "not approved in time") in detail
    assert (await login.ask("GET"))["state"] == "ended"
    assert (await login.ask("POST", 201))["state"] == "waiting"


@pytest.mark.parametrize("rotates", [True, False])
@ensure
async def test_tokens_are_renewed_before_they_end(service: Service, issuer: Issuer, rotates: bool) -> None:
    issuer.rotates = rotates
    login = await made(service, issuer, f"renewed {rotates}".replace(" ", "-"), audience=["storage"])
    first = await login.log_in()
    assert first["next_renewal"] < first["valid_until"]
    assert await login.renew(timedelta(minutes=50)) == first, "not due yet"
    used = []
    for _ in range(3):
        (before,) = issuer.valid
        issuer.lifetime_s += 3600
        assert (await login.renew())["refreshed_at"] > first["refreshed_at"]
        used.append(issuer.forms("/vo/token")[-1])
        assert used[-1]["refresh_token"] == before
        assert used[-1]["audience"] == "storage"
    assert (len(issuer.valid), len({each["refresh_token"] for each in used})) == (1, 3 if rotates else 1)


@ensure
async def test_a_running_batch_gets_the_next_token(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "batch")
    await login.log_in()
    credentials, user_id = service.assembly.executor.credentials, await service.user_id("batch")
    usable = await credentials.usable(user_id, TOKEN, {login.site}, service.now())
    path = usable.sites[login.site].path
    before = path.read_text()
    issuer.lifetime_s = 7200
    await login.renew()
    assert path.read_text() != before
    assert (await credentials.outdated()).ended == frozenset()
    credentials.release(usable.fingerprint)
    credentials.remove_unused(usable.fingerprint)


@ensure
async def test_an_ended_login_holds_jobs_until_the_next(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "ended")
    await login.log_in()
    issuer.valid.clear()
    over = await login.renew()
    assert (over["state"], over["next_renewal"]) == ("ended", None)
    assert "invalid_grant: grant request is invalid" in over["error"]
    assert (await login.token())["sub"] == "alice", "the last token is used until it ends"
    count = len(issuer.asked)
    await login.renew(_LONG)
    assert len(issuer.asked) == count, "it is not asked again"
    error = await login.unusable()
    assert error.failure.code is FailureCode.CREDENTIAL_EXPIRED
    assert f"run 'pdm login {login.site} --oidc'" in error.failure.message
    issuer.lifetime_s = 36000
    assert (await login.log_in())["state"] == "active"
    assert (await login.token())["sub"] == "alice"


@ensure
async def test_an_issuer_that_is_away_is_asked_again(service: Service, issuer: Issuer) -> None:
    login, other = await made(service, issuer, "away"), await made(service, issuer, "too")
    await login.log_in()
    await other.log_in()
    issuer.fault = lambda path: (503, {}, b"")
    issuer.asked.clear()
    state = await login.renew(_LONG)
    assert (state["state"], state["error"]) == ("retrying", "it answered 503")
    assert (await other.ask("GET"))["state"] == "retrying"
    assert len(issuer.asked) <= 2, "one asks for all, and its metadata are known or asked for once"
    error = await login.unusable()
    assert error.failure.code is FailureCode.ISSUER_UNAVAILABLE
    assert error.failure.retryable
    assert "has not renewed it yet (it answered 503)" in error.failure.message
    pauses = []
    for _ in range(4):
        state = await login.renew(timedelta(minutes=15))
        pauses.append(state["next_renewal"])
    assert len(set(pauses)) == 4
    issuer.fault = lambda path: None
    issuer.lifetime_s = 360000
    state = await login.renew(timedelta(minutes=15))
    assert (state["state"], state["error"]) == ("active", None)
    assert (await login.token())["sub"] == "alice"


@ensure
async def test_a_secret_that_an_issuer_sends_back_is_left_out(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "echo", client_secret="a secret")
    await login.log_in()

    def echo(path: str) -> Any:
        if path != "/vo/token":
            return None
        words = f"Invalid refresh token: {issuer.asked[-1][1]['refresh_token']}"
        return 400, {}, json.dumps({"error": "invalid_grant", "error_description": words}).encode()

    issuer.fault = echo
    over = await login.renew()
    assert (over["state"], "invalid_grant: Invalid refresh token: ***" in over["error"]) == ("ended", True), over


_HUGE = b'{"access_token": "' + b"x" * 70_000 + b'"}'
_FAULTS: dict[str, tuple[Any, str]] = {
    "500": ((500, {}, b"oops"), "it answered 500"),
    "not found": ((404, {}, b""), "it answered 404"),
    "redirect": ((302, {"location": "https://169.254.169.254/"}, b""), "a redirect, which is not followed"),
    "garbage": ((200, {}, b"\xff\xfe not JSON"), "its answer is not valid"),
    "another type": ((200, {}, b'["access_token"]'), "its answer is not valid"),
    "deep": ((200, {}, b"[" * 50_000), "its answer is not valid"),
    "huge": ((200, {}, _HUGE), "more than 65536 bytes"),
    "hang": ("hang", "did not answer within 1 s"),
    "no bearer": ((200, {}, b'{"access_token": "a", "token_type": "mac"}'), "no bearer token"),
    "odd token": ((200, {}, b'{"access_token": "a b\\r\\n"}'), "no usable token"),
    "odd times": ((200, {}, b'{"access_token": "a", "expires_in": "never"}'), "its answer is not valid"),
    "busy": ((429, {}, b'{"error": "invalid_grant"}'), "it answered 429"),
    "down": ((400, {}, b'{"error": "temporarily_unavailable"}'), "it answered 400"),
    "unknown client": ((401, {}, b'{"error": "invalid_client"}'), "the issuer refuses to renew the token"),
}


#: The others take the same way through the code as one of these.
_USUAL = ("500", "redirect", "garbage", "huge", "hang", "unknown client")


@pytest.mark.parametrize(
    "fault", [each if each in _USUAL else pytest.param(each, marks=pytest.mark.full) for each in _FAULTS]
)
@ensure
async def test_a_bad_answer_never_ends_a_login(service: Service, issuer: Issuer, fault: str) -> None:
    answer, words = _FAULTS[fault]
    login = await made(service, issuer, f"bad-{fault}".replace(" ", "-"))
    await login.log_in()
    issuer.fault = lambda path: answer if path == "/vo/token" else None
    state = await login.renew(timedelta(minutes=57))
    assert state["state"] == "retrying", state
    assert words in state["error"]
    issuer.fault = lambda path: None
    issuer.lifetime_s = 36000
    assert (await login.renew(timedelta(minutes=11)))["state"] == "active"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"issuer": "https://other.example.org"}, "those of another issuer, https://other.example.org"),
        ({"token_endpoint": 7}, "its answer is not valid"),
        ({"device_authorization_endpoint": "http://localhost/device"}, "must begin with https://"),
        ({"device_authorization_endpoint": "https://10.0.0.1@localhost/"}, "its URL is not accepted"),
        ({"device_authorization_endpoint": None}, "offers no device authorization"),
    ],
)
@ensure
async def test_metadata_lead_to_no_other_place(
    service: Service, issuer: Issuer, metadata: dict[str, Any], words: str
) -> None:
    issuer.metadata = metadata
    login = await made(service, issuer, f"metadata-{abs(hash(str(metadata)))}")
    answer = await service.call(login.user, "POST", f"/sites/{login.site}/login")
    assert answer.status in (409, 424)
    assert words in answer.json["detail"]


@pytest.mark.full
@ensure
async def test_an_issuer_of_this_machine_must_be_allowed(own_service: Service, issuer: Issuer) -> None:
    login = await made(own_service, issuer, "local")
    answer = await own_service.call("local", "POST", f"/sites/{login.site}/login")
    assert (answer.status, answer.json["type"].rpartition(":")[2]) == (424, "site-failed")
    assert issuer.asked == []


@ensure
async def test_a_rotated_token_is_kept_when_the_exchange_fails(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "exchange", exchange=True, audience=["https://ours"])
    await login.log_in()
    assert (await login.token())["aud"] == "https://ours"
    exchange = "urn:ietf:params:oauth:grant-type:token-exchange"
    issuer.fault = lambda path: (500, {}, b"") if issuer.asked[-1][1].get("grant_type") == exchange else None
    state = await login.renew()
    assert (state["state"], state["error"]) == ("retrying", "the token exchange failed: it answered 500")
    issuer.fault = lambda path: None
    issuer.lifetime_s = 36000
    assert (await login.renew(timedelta(minutes=11)))["state"] == "active", "with the refresh token of the failed try"
    assert (await login.token())["aud"] == "https://ours"


@ensure
async def test_a_replaced_token_is_tried_if_its_successor_is_lost(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "spare")
    await login.log_in()
    (first,) = issuer.valid
    issuer.lifetime_s = 7200
    await login.renew()
    # The issuer is restored from a backup.
    issuer.valid = {first}
    issuer.lifetime_s = 36000
    assert (await login.renew(timedelta(hours=1)))["state"] == "active"


@ensure
async def test_one_daemon_renews(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "leased")
    await login.log_in()
    service.skip[0] += _HOUR
    incarnation = service.assembly.lease.worker.incarnation
    database, now = service.database, service.now()
    (mine,) = await database.run("claim", oidc_logins.claim_due, incarnation, 8, 300.0, now)
    assert await database.run("claim", oidc_logins.claim_due, "another", 8, 300.0, now) == []
    # A daemon whose lease has ended meanwhile stores what it got all the same; not over a newer login.
    assert await database.run("fail", oidc_logins.failed, mine, "x", now) is True
    await login.log_in()
    assert await database.run("fail", oidc_logins.failed, mine, "x", now) is False
    assert await database.run("keep", oidc_logins.keep_secret, mine, b"old") is None


@pytest.mark.parametrize("answered", [False, True])
@ensure
async def test_a_daemon_that_was_killed_while_it_renewed(service: Service, issuer: Issuer, answered: bool) -> None:
    login = await made(service, issuer, f"killed-{answered}")
    await login.log_in()
    # The request of the killed daemon has come to the issuer, or not; its answer was not stored.
    if answered:
        issuer.valid = {"the token of an answer that is lost"}
    service.skip[0] += _HOUR
    killed = await service.database.run("claim", oidc_logins.claim_due, "killed", 8, 300.0, service.now())
    assert [each.site_id for each in killed if each.user_id == await service.user_id(login.user)] == [login.site]
    issuer.lifetime_s = 36000
    state = await login.renew(timedelta())
    if answered:
        assert state["state"] == "ended"
        assert state["error"].endswith("the service was interrupted during the last renewal")
    else:
        assert state["state"] == "active"


@ensure
async def test_who_may_choose_an_issuer(service: Service, issuer: Issuer) -> None:
    body = {"name": "mine", "endpoints": {"HTTPS": "https://dav.example.org"}}
    for oidc in ({"issuer": issuer.url, "client_id": "pdm"}, {"audience": ["https://bank.example.org"]}):
        answer = await service.call("owner", "POST", "/sites", body | {"oidc": oidc})
        assert answer.status == 403, oidc
    assert (await service.call("owner", "POST", "/sites", body | {"oidc": {"issuer": issuer.url}})).status == 201


@ensure
async def test_a_changed_site_keeps_its_secret_and_ends_logins_of_another_client(
    service: Service, issuer: Issuer
) -> None:
    login = await made(service, issuer, "changed", client_secret="a secret")
    await login.log_in()
    path, oidc = f"/sites/{login.site}", {"issuer": issuer.url, "client_id": "pdm", "scope": "offline_access read:/"}
    changed = (await service.call("operator", "PATCH", path, {"oidc": oidc})).json["oidc"]
    assert (changed["has_secret"], changed["scope"]) == (True, "offline_access read:/")
    issuer.lifetime_s = 7200
    assert (await login.renew())["state"] == "active"
    answer = await service.call("operator", "PATCH", path, {"oidc": oidc | {"client_id": "other"}})
    assert answer.json["oidc"]["has_secret"] is False
    count = len(issuer.asked)
    assert "another issuer or client" in (await login.renew(_LONG))["error"]
    assert len(issuer.asked) == count


@ensure
async def test_a_user_logs_in_by_a_refresh_token(service: Service, issuer: Issuer) -> None:
    login = await made(service, issuer, "taker", scope="offline_access")
    path = f"/sites/{login.site}/login/refresh-token"
    refused = await service.call("taker", "PUT", path, {"refresh_token": "of somebody else"})
    assert (refused.status, refused.problem) == (409, "conflict")
    assert "refuses the refresh token" in refused.json["detail"]
    assert "of somebody else" not in refused.body.decode()
    assert await login.ask("GET") is None, "nothing is stored of a token that is refused"
    _, given = issuer.answer("/vo/token", {"grant_type": "urn:ietf:params:oauth:grant-type:device_code"})
    answer = await service.call("taker", "PUT", path, {"refresh_token": given["refresh_token"]})
    assert (answer.status, answer.json["state"], answer.json["subject"]) == (200, "active", f"alice at {issuer.url}")
    assert answer.json["next_renewal"] is not None
    assert (await login.token())["sub"] == "alice"
    assert (await login.renew())["state"] == "active"
    bodies: list[dict[str, str]] = [{}, {"refresh_token": ""}, {"refresh_token": "two\nlines"}]
    for wrong in bodies:
        assert (await service.call("taker", "PUT", path, wrong)).status == 400
    foreign = await service.call("taker", "PUT", "/sites/1/login/refresh-token", {"refresh_token": "x"})
    assert foreign.status == 409, "a site without an issuer"
