"""Building one box: stage, create, start, check, release. On any failure nothing of it stays.

The order is the security: the container is compared with its spec before it starts; its PID 1 is our guest, which
runs nothing until it is released; and it is released only after the kernel has confirmed every confinement and
every mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.agents.channel import Channel, Hello, Release, StartFailure, remove_folder
from isolator.backends.base import Backend
from isolator.cancellation import uninterrupted
from isolator.host.cgroups import Cgroup, check_limits
from isolator.host.folders import HeldFolder, check_mounts_inside, stage, unstage
from isolator.host.processes import check_confinement
from isolator.model.box import BoxSpec
from isolator.model.errors import BadRequest, BoxFailed, IsolatorError

_log = logging.getLogger(__name__)
_GUEST_TIMEOUT = 30.0
_LOOK_AFTER = 3.0
_CLEANUP_TIMEOUT = 45.0
_LOOK_AGAIN = 0.01
_LOG_LINES = 20

Secrets = Sequence[tuple[str, str, bytes]]


@dataclass(frozen=True, slots=True)
class BuiltBox:
    """A checked box: its id on the engine, its PID 1 on the host, whether its memory cap counts swap."""

    box_id: str
    pid: int
    swap_capped: bool


class BoxBuilder:
    """Builds boxes with one backend under one runtime folder."""

    def __init__(self, backend: Backend, runtime_dir: Path) -> None:
        """`runtime_dir` holds agents/ and mounts/."""
        self._backend = backend
        self._runtime = runtime_dir

    def folder(self, agent: str) -> Path:
        """The agent's folder on the host, /run/isolator in its box."""
        return self._runtime / "agents" / agent

    def staging(self, agent: str) -> Path:
        """Where the agent's mounts are staged while it is built."""
        return self._runtime / "mounts" / agent

    async def build(self, spec: BoxSpec, held: Sequence[HeldFolder], secrets: Secrets, channel: Channel) -> BuiltBox:
        """Build and release one box.

        Raises:
            BoxFailed, BadRequest, Unavailable: what was made is removed.
        """
        pending: list[asyncio.Task[Any]] = []
        try:
            box = await self._prepare(spec, held, channel, pending)
            await self.release(spec, box, Release(secrets), channel)
            # The engine calls it running only when its start call returns; until then `docker ps` would disagree.
            await asyncio.shield(pending[-1])
        except BaseException:
            await uninterrupted(self._undo(spec, channel, pending))
            raise
        finally:
            if held:
                await uninterrupted(asyncio.to_thread(unstage, self.staging(spec.agent)))
        return box

    async def prepare(self, spec: BoxSpec, channel: Channel) -> BuiltBox:
        """Build and check one box without mounts, and leave it waiting for its release.

        Raises:
            BoxFailed, Unavailable: what was made is removed.
        """
        pending: list[asyncio.Task[Any]] = []
        try:
            box = await self._prepare(spec, (), channel, pending)
            await asyncio.shield(pending[-1])
        except BaseException:
            await uninterrupted(self._undo(spec, channel, pending))
            raise
        return box

    async def _prepare(
        self,
        spec: BoxSpec,
        held: Sequence[HeldFolder],
        channel: Channel,
        pending: list[asyncio.Task[Any]],
    ) -> BuiltBox:
        channel.listen()
        if held:
            await uninterrupted(asyncio.to_thread(stage, spec, held))
        creating = asyncio.create_task(self._backend.create(spec))
        pending.append(creating)
        box_id = await asyncio.shield(creating)
        channel.expect(box_id)
        starting = asyncio.create_task(self._backend.start(box_id))
        pending.append(starting)
        hello = await self._await_guest(box_id, channel, starting)
        check_confinement(hello.pid, spec)
        swap_capped = check_limits(Cgroup.of(hello.pid), spec.limits)
        check_mounts_inside(spec, hello.pid)
        return BuiltBox(box_id, hello.pid, swap_capped)

    async def release(self, spec: BoxSpec, box: BuiltBox, release: Release, channel: Channel) -> None:
        """Let a checked box run its command.

        Raises:
            BoxFailed: `guest_failed`. BadRequest: `command_not_found` and the like. The box stays.
        """
        try:
            started = await asyncio.wait_for(channel.release(release), _GUEST_TIMEOUT)
        except (ConnectionError, TimeoutError):
            raise BoxFailed(
                "guest_failed",
                "The box's PID 1 ended or fell silent before the command ran.",
                output=await self._last_words(box.box_id),
            ) from None
        if isinstance(started, StartFailure):
            if started.folder:
                raise BoxFailed("guest_failed", f"uid {spec.uid} can't enter {spec.working_dir} once the box runs.")
            raise _command_refused(spec, started)

    async def _await_guest(self, box_id: str, channel: Channel, starting: asyncio.Task[None]) -> Hello:
        greeting = asyncio.create_task(channel.hello())
        try:
            await asyncio.wait({greeting, starting}, return_when=asyncio.FIRST_COMPLETED, timeout=_GUEST_TIMEOUT)
            if not greeting.done() and starting.done():
                starting.result()
                await asyncio.wait({greeting}, timeout=_LOOK_AFTER)
            if not greeting.done():
                box = await self._backend.inspect(box_id)
                if starting.done() and (box is None or box.state == "exited"):
                    raise BoxFailed(
                        "guest_failed",
                        "The box's PID 1 ended before it could report. Is the image's Python whole?",
                        output=await self._last_words(box_id),
                    )
            return await asyncio.wait_for(greeting, _GUEST_TIMEOUT)
        except TimeoutError:
            raise BoxFailed("guest_silent", f"The box did not report within {_GUEST_TIMEOUT:.0f} s.") from None
        finally:
            greeting.cancel()

    async def _last_words(self, box_id: str) -> str:
        words = b""
        with contextlib.suppress(Exception):
            async for chunk in self._backend.logs(box_id, follow=False, tail=_LOG_LINES):
                words += chunk.data
        return words[-1000:].decode(errors="replace")

    async def _undo(self, spec: BoxSpec, channel: Channel, pending: list[asyncio.Task[Any]]) -> None:
        """Remove what was made; a call under way is waited for, or its container would appear after the cleanup."""
        channel.close()
        try:
            if pending:
                await asyncio.wait(pending, timeout=_CLEANUP_TIMEOUT)
                for task in pending:
                    if task.done() and not task.cancelled():
                        task.exception()
                await self._backend.remove(spec.box_name)
        except Exception as error:  # noqa: BLE001 - the engine may be the reason; reconcile removes it later
            _log.warning("the half-made box of %s waits for reconcile: %s", spec.agent, error)
        await asyncio.to_thread(remove_folder, self.folder(spec.agent))

    async def demolish(self, spec: BoxSpec, channel: Channel, box_id: str | None = None) -> None:
        """Remove a box that was built but can't be kept; never raises, reconcile removes what could not be."""
        channel.close()
        try:
            await self._backend.remove(box_id or spec.box_name)
        except IsolatorError as error:
            _log.warning("the box of %s waits for reconcile: %s", spec.agent, error)
        await self.discard(spec.agent)

    async def until_ended(self, box_id: str, timeout: float) -> None:
        """Return when the engine calls the box ended, or after `timeout` seconds.

        The guest tells of the end a little before the engine has read all of the output; by then it has.

        Raises:
            Unavailable: `engine_unavailable`.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            box = await self._backend.inspect(box_id)
            if box is None or box.state == "exited":
                return
            await asyncio.sleep(_LOOK_AGAIN)

    async def discard(self, agent: str) -> None:
        """Remove what the host holds of an agent: its folder and staged mounts."""
        await asyncio.to_thread(unstage, self.staging(agent))
        await asyncio.to_thread(remove_folder, self.folder(agent))


def _command_refused(spec: BoxSpec, failure: StartFailure) -> BadRequest:
    program = spec.command[0][:200] if spec.command else ""
    if failure.errno == 2:
        return BadRequest(
            "command_not_found",
            f"{program} is not in the image {spec.image} (or its interpreter is not). Name another command or image.",
            command=program,
        )
    if failure.errno == 7:
        return BadRequest("command_too_long", "The command and environment are longer than the kernel takes.")
    return BadRequest(
        "command_not_executable",
        f"{program} can't be executed (errno {failure.errno}): is it a program with its x bit set?"
        " /tmp is noexec; the workspace is not.",
        command=program,
        errno=failure.errno,
    )
