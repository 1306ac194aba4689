"""Routes requests of clients of FTS3 to handlers, and writes answers and errors as FTS3 does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from attrs import define, field
from twisted.internet.defer import CancelledError
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import Map, Rule

from pdm.workqueue.certificates.proxies import voms_attributes
from pdm.workqueue.certificates.tls_server import verified_chain
from pdm.workqueue.http.access import Authenticator
from pdm.workqueue.http.app import REQUEST_PATIENCE_S, admitted_caller, problem_of, run_eagerly
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.endpoint import JsonStream
from pdm.workqueue.http.fts import data, identity, jobs, operators
from pdm.workqueue.http.fts.calls import DelegationTimeoutError, FtsAnswer, FtsCall, FtsHandler, FtsUser
from pdm.workqueue.http.problems import (
    ApiError,
    DelegationNeededError,
    ErrorFormat,
    InvalidInputError,
    MethodNotAllowedError,
    NotFoundError,
)
from pdm.workqueue.http.request import ApiRequest, write_problem, write_response, write_stream
from pdm.workqueue.store.outages import begin_request
from pdm.workqueue.telemetry.logging import log_context

#: Method, path and what answers it; a path with a slash at its end is the same.
ROUTES: Sequence[tuple[str, str, FtsHandler]] = (
    ("GET", "/", identity.show_door),
    ("GET", "/whoami", identity.whoami),
    ("GET", "/whoami/certificate", identity.show_certificate),
    ("GET", "/delegation/<delegation_id>", identity.show_delegation),
    ("DELETE", "/delegation/<delegation_id>", identity.remove_delegation),
    ("GET", "/delegation/<delegation_id>/request", identity.show_request),
    ("PUT", "/delegation/<delegation_id>/credential", identity.put_credential),
    ("POST", "/delegation/<delegation_id>/credential", identity.put_credential),
    ("POST", "/jobs", jobs.submit_job),
    ("PUT", "/jobs", jobs.submit_job),
    ("GET", "/jobs", jobs.list_jobs),
    ("GET", "/jobs/<job_ids>", jobs.show_jobs),
    ("POST", "/jobs/<job_ids>", jobs.modify_jobs),
    ("DELETE", "/jobs/<job_ids>", jobs.cancel_jobs),
    ("GET", "/jobs/<job_id>/files", jobs.show_files),
    ("DELETE", "/jobs/<job_id>/files/<file_ids>", jobs.cancel_files),
    ("GET", "/jobs/<job_id>/files/<file_id>/retries", jobs.show_retries),
    ("GET", "/jobs/<job_id>/dm", jobs.show_data_management),
    ("GET", "/jobs/<job_id>/<field>", jobs.show_field),
    ("GET", "/dm/list", data.list_directory),
    ("GET", "/dm/stat", data.show_status),
    ("POST", "/dm/mkdir", data.make_directory),
    ("POST", "/dm/unlink", data.unlink),
    ("POST", "/dm/rename", data.rename),
    ("POST", "/dm/rmdir", data.remove_directory),
    ("GET", "/ban/se", operators.list_storages),
    ("POST", "/ban/se", operators.ban_storage),
    ("DELETE", "/ban/se", operators.unban_storage),
    ("GET", "/ban/dn", operators.list_users),
    ("POST", "/ban/dn", operators.ban_user),
    ("DELETE", "/ban/dn", operators.unban_user),
    ("GET", "/status/hosts", operators.show_hosts),
)
#: Statuses that have no name in HTTP.
_NAMES = {419: DelegationTimeoutError.title}


def fts_url_map() -> Map:
    """The routes, for werkzeug; an endpoint is a handler with the path for the log."""
    # CERN's client sends two slashes between the endpoint and the path.
    return Map(
        [Rule(path, methods=[method], endpoint=(handler, path)) for method, path, handler in ROUTES],
        strict_slashes=False,
        merge_slashes=False,
        redirect_defaults=False,
    )


@define(eq=False, kw_only=True)
class FtsApi:
    """Answers the requests of the door.

    Attributes:
        api: what the handlers use.
        authenticator: that of the service's own API.
    """

    api: ApiContext
    authenticator: Authenticator
    _urls: Map = field(factory=fts_url_map)
    #: Of each connection: an identity does not change.
    _users: WeakKeyDictionary[Any, FtsUser] = field(factory=WeakKeyDictionary)

    async def serve(self, request: ApiRequest) -> None:
        """Answer a request, errors included."""
        transactions = begin_request(REQUEST_PATIENCE_S)
        with log_context(request_id=request.request_id) as fields:
            try:
                await self._answer(request, await self._call(request, fields))
            except CancelledError:
                raise
            except Exception as error:
                write_problem(request, *problem_of(_fts_error(error)))
            finally:
                transactions.is_over = True

    async def _call(self, request: ApiRequest, fields: dict[str, Any]) -> FtsAnswer:
        handler, values = self._route(request)
        caller = await admitted_caller(request, self.api, self.authenticator, fields)
        transport = request.channel.transport
        user = self._users.get(transport)
        if user is None or user.caller != caller:
            fqans = [fqan for each in voms_attributes(verified_chain(transport)) for fqan in each.fqans]
            user = self._users[transport] = FtsUser.of(caller, fqans)
        return await handler(
            FtsCall(
                api=self.api,
                user=user,
                values=values,
                raw_query=request.uri.partition(b"?")[2],
                body=request.body(),
                transport=transport,
            )
        )

    def _route(self, request: ApiRequest) -> tuple[FtsHandler, Mapping[str, str]]:
        try:
            path = "/" + request.path.decode("utf-8").strip("/")
            method = request.method.decode("ascii")
        except UnicodeDecodeError as error:
            raise InvalidInputError("the URL or the method is not valid text") from error
        try:
            rule, values = self._urls.bind("door").match(path, method, return_rule=True)
        except MethodNotAllowed as error:
            allowed = ", ".join(sorted(error.valid_methods or ()))
            raise MethodNotAllowedError(f"allowed: {allowed}", None, {"Allow": allowed}) from error
        except (NotFound, HTTPException) as error:
            raise NotFoundError(f"FTS has no such address here: {path[:200]}") from error
        handler, template = rule.endpoint
        request.template = f"fts {template}"
        return handler, values

    async def _answer(self, request: ApiRequest, answer: FtsAnswer) -> None:
        for name, value in answer.headers.items():
            request.setHeader(name, value)
        if isinstance(answer.content, JsonStream):
            await write_stream(request, answer.status, answer.content)
        else:
            content = answer.content
            encoded = content if isinstance(content, bytes) else msgspec.json.encode(content)
            write_response(request, answer.status, encoded, answer.media_type.encode("ascii"))


def _error_body(error: ApiError, _request_id: str, _incident: str | None) -> bytes:
    status = f"{error.status} {_NAMES.get(error.status) or HTTPStatus(error.status).phrase}"
    return msgspec.json.encode({"status": status, "message": error.detail})


#: Errors as FTS3 writes them.
FTS_ERRORS = ErrorFormat("application/json", _error_body)


def _fts_error(error: Exception) -> Exception:
    """What FTS3 answers where the service's own API answers something else."""
    return DelegationTimeoutError(error.detail) if isinstance(error, DelegationNeededError) else error


class FtsResource(Resource):
    """The root of the door."""

    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self, door: FtsApi) -> None:
        super().__init__()
        self._door = door

    def render(self, request: ApiRequest) -> int:
        waiting = run_eagerly(self._door.serve(request))
        if waiting is None:
            request.finish()
            return NOT_DONE_YET
        request.notifyFinish().addErrback(lambda _: waiting.cancel())

        def finish(_: object) -> None:
            if not request.gone:
                request.finish()

        waiting.addCallbacks(finish, lambda _: None)
        return NOT_DONE_YET
