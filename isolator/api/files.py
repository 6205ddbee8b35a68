"""Routes of files in a running agent's mounts.

The path is taken from the address as it was sent, not as the router decoded it: a file's name is bytes, and what the
router makes of them can't be undone. A change is in the audit log before it is made; reads are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import AsyncIterator, Awaitable
from email.utils import formatdate
from typing import TypeVar
from urllib.parse import unquote_plus

from aiohttp import hdrs, web

from isolator.api.access import caller_of
from isolator.api.download import answer_content
from isolator.api.parts import PARTS, Parts
from isolator.api.wire import RequestTimeout, json_answer, query_flag, query_text
from isolator.cancellation import uninterrupted
from isolator.execs.service import refuse_not_running
from isolator.files.facts import FileFacts
from isolator.files.paths import Names, parse_absolute, parse_path
from isolator.files.roots import Target
from isolator.files.writing import WriteOptions
from isolator.model.agent import Agent
from isolator.model.errors import BadRequest, IsolatorError

Result = TypeVar("Result")

# A body shorter than this is written in one step on one thread, a longer one in pieces of it.
_PIECE = 1 << 20
_MODE = re.compile(r"[0-7]{1,4}\Z")
_ACTS = ("mkdir", "rename", "copy")


async def read(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents/{agent}/files/{path}: content, or with ?list or ?stat what is told of it."""
    parts, agent, names = _asked(request)
    wants_list, wants_facts = query_flag(request, "list"), query_flag(request, "stat")
    if wants_list and wants_facts:
        raise BadRequest("invalid_query", "?list and ?stat are two questions.")
    if wants_list and not names:
        return web.Response(body=await parts.files.list_mounts(agent), content_type="application/json")
    target = parts.files.target(agent, names)
    if wants_list:
        return web.Response(body=await parts.files.list_folder(target), content_type="application/json")
    if wants_facts:
        return json_answer((await parts.files.look(target, follow=False)).answer(names))
    async with parts.files.open(target) as file:
        return await answer_content(request, parts.files, file, _headers(file.facts))


async def head(request: web.Request) -> web.StreamResponse:
    """HEAD: the headers of GET, and for folders too."""
    parts, agent, names = _asked(request)
    facts = await parts.files.look(parts.files.target(agent, names), follow=True)
    headers = _headers(facts)
    if facts.kind == "file":
        headers[hdrs.CONTENT_LENGTH] = str(facts.size)
    return web.Response(headers=headers, content_type="application/octet-stream")


async def write(request: web.Request) -> web.StreamResponse:
    """PUT: the body becomes the file, whole or not at all."""
    parts, agent, names = _asked(request)
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower() != "identity":
        raise BadRequest("encoding_unsupported", "Bodies are kept as they are: send it without Content-Encoding.")
    if hdrs.CONTENT_RANGE in request.headers:
        raise BadRequest("content_range_refused", "A file is written whole, never a part of it.")
    options = WriteOptions(_mode(request), _is_exclusive(request), query_flag(request, "parents"), _match(request))
    target = parts.files.target(agent, names)
    target.refuse_root()
    patience = parts.settings.request_timeout
    async with parts.files.uploading():
        piece = await _piece(request, patience)
        async with _audited(request, "file.write", target) as act:
            if len(piece) < _PIECE:
                facts, is_new = await act.finish(parts.files.write_small(target, options, piece))
            else:
                async with parts.files.upload(target, options) as upload:
                    while piece:
                        reading = asyncio.ensure_future(_piece(request, patience))
                        try:
                            await parts.files.add(upload, piece)
                            piece = await reading
                        finally:
                            reading.cancel()
                    facts, is_new = await act.finish(parts.files.commit(upload))
    return _told(facts, names, is_new=is_new)


async def change(request: web.Request) -> web.StreamResponse:
    """POST ?mkdir, ?rename=NEW, ?copy=NEW."""
    parts, agent, names = _asked(request)
    acts = [act for act in _ACTS if act in request.query]
    if len(acts) != 1:
        raise BadRequest("invalid_query", "Say exactly one of ?mkdir, ?rename=NEW and ?copy=NEW.")
    replace, parents = query_flag(request, "replace", default=True), query_flag(request, "parents")
    target = parts.files.target(agent, names)
    if acts == ["mkdir"]:
        if not query_flag(request, "mkdir"):
            raise BadRequest("invalid_query", "?mkdir=false asks for nothing.")
        async with _audited(request, "file.mkdir", target) as act:
            facts, is_new = await act.finish(parts.files.make_folder(target, parents=parents))
        return _told(facts, names, is_new=is_new)
    new_names = _other_path(request, acts[0])
    new = parts.files.target(agent, new_names)
    async with _audited(request, f"file.{acts[0]}", target, to=new.place.text[:1024]) as act:
        if acts == ["rename"]:
            facts, is_new = await act.finish(parts.files.rename(target, new, replace=replace)), False
        else:
            options = WriteOptions(exclusive=not replace, parents=parents)
            facts, is_new = await parts.files.copy(target, new, options, act.finish)
    return _told(facts, new_names, is_new=is_new)


async def remove(request: web.Request) -> web.StreamResponse:
    """DELETE: a file, a link, an empty folder; with ?recursive a tree."""
    parts, agent, names = _asked(request)
    recursive = query_flag(request, "recursive")
    target = parts.files.target(agent, names)
    async with _audited(request, "file.remove", target, recursive=recursive) as act:
        removing = parts.files.remove(target, recursive=recursive)
        if recursive:
            await removing
        else:
            await act.finish(removing)
    return web.Response(status=204)


class _Act:
    """A change whose intent is written. `finish` is its last step, the one that shows."""

    def __init__(self, outcome: functools.partial[None]) -> None:
        self.outcome = outcome
        self.is_done = False

    async def finish(self, work: Awaitable[Result]) -> Result:
        """Do it to its end even if the caller hangs up, so that the log tells what became of it."""

        async def done() -> Result:
            result = await work
            self.is_done = True
            return result

        return await uninterrupted(done())


@contextlib.asynccontextmanager
async def _audited(request: web.Request, act: str, target: Target, **detail: object) -> AsyncIterator[_Act]:
    audit = request.app[PARTS].audit
    subject = {"team": target.agent.spec.team, "agent": target.agent.id, "path": target.place.text[:1024]}
    intent = await audit.intent(act, caller_of(request), **subject, **detail)
    one = _Act(functools.partial(audit.outcome_later, intent, act))
    try:
        yield one
    except BaseException as error:
        if one.is_done:
            one.outcome("done", **subject)
        elif isinstance(error, asyncio.CancelledError):
            one.outcome("undone", **subject, code="caller_gone")
        else:
            code = error.code if isinstance(error, IsolatorError) else type(error).__name__
            one.outcome("failed", **subject, code=code)
        raise
    one.outcome("done", **subject)


def _asked(request: web.Request) -> tuple[Parts, Agent, Names]:
    parts = request.app[PARTS]
    # /v1/agents/{agent}/files/{path}, as the router has found.
    names = parse_path(request.rel_url.raw_path.split("/", 5)[5])
    live = refuse_not_running(parts.lifecycle.find(request.match_info["agent"]))
    return parts, live.record, names


def _other_path(request: web.Request, name: str) -> Names:
    for pair in request.rel_url.raw_query_string.split("&"):
        key, _, value = pair.partition("=")
        if unquote_plus(key) == name:
            return parse_absolute(value.replace("+", "%20"))
    raise BadRequest("invalid_query", f"?{name}= names no path.")


def _headers(facts: FileFacts) -> dict[str, str]:
    headers = {
        "ETag": facts.etag,
        "X-Isolator-Type": facts.kind,
        "X-Isolator-Mode": f"{facts.mode:04o}",
        "Accept-Ranges": "bytes" if facts.kind == "file" else "none",
        # It is the agent's own text, whatever its name says.
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    with contextlib.suppress(ValueError, OverflowError, OSError):
        headers["Last-Modified"] = formatdate(facts.changed // 10**9, usegmt=True)
    return headers


def _told(facts: FileFacts, names: Names, *, is_new: bool) -> web.Response:
    return json_answer(facts.answer(names), 201 if is_new else 200, {"ETag": facts.etag})


def _mode(request: web.Request) -> int | None:
    text = query_text(request, "mode")
    if text is None:
        return None
    if not _MODE.match(text) or int(text, 8) > 0o777:
        raise BadRequest("invalid_query", "?mode= must be octal, from 0 to 0777; there are no set-id bits here.")
    return int(text, 8)


def _is_exclusive(request: web.Request) -> bool:
    condition = request.headers.get(hdrs.IF_NONE_MATCH)
    if condition not in (None, "*"):
        raise BadRequest("condition_unsupported", "Of If-None-Match only * is understood: if nothing is there.")
    return condition == "*" or query_flag(request, "exclusive")


def _match(request: web.Request) -> str | None:
    condition = request.headers.get(hdrs.IF_MATCH)
    if condition is not None and condition != "*" and not re.fullmatch(r'"[0-9a-f-]{1,80}"', condition):
        raise BadRequest("condition_unsupported", "If-Match takes one ETag of this API, or *.")
    return condition


async def _piece(request: web.Request, patience: float) -> bytes:
    """The next MiB of the body, or what is left of it. Each wait for the sender is bounded, the whole is not."""
    loop = asyncio.get_running_loop()
    held: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(patience) as limit:
            while size < _PIECE and (data := await request.content.readany()):
                held.append(data)
                size += len(data)
                limit.reschedule(loop.time() + patience)
    except TimeoutError:
        raise RequestTimeout("request_timeout", f"The sender was silent for {patience:.0f} s.") from None
    return b"".join(held)
