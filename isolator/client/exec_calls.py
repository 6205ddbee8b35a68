"""The client's calls that run a command in an agent's box: `run` to the end, `exec` with its streams passed."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from isolator.client.errors import AnswerInvalid
from isolator.client.execs import Exec, RunResult
from isolator.client.location import Location
from isolator.client.transport import request
from isolator.client.websocket import open_websocket

_PROTOCOL: Final = "v5.channel.k8s.io"
# The daemon's are at most 256 KiB and the channel's byte.
_LARGEST_MESSAGE: Final = 1 << 20
_SPARE: Final = 15.0
# The daemon allows no more; without a timeout of its own a command may take as long.
_LONGEST_RUN: Final = 7 * 86_400.0


class ExecCalls:
    """`run` and `exec` of the client."""

    location: Location
    timeout: float

    def run(
        self,
        agent: str,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
        max_output: int | None = None,
    ) -> RunResult:
        """Run a command in an agent's box to its end. Leaving early, as by Ctrl-C, kills it.

        Args:
            agent: its id.
            command: argv, no shell.
            stdin: all it can read.
            env: variables beside the agent's own.
            cwd: absolute; default: the agent's own folder.
            timeout: seconds until all of it is killed.
            max_output: bytes kept of each stream; `truncated` tells that there were more.

        Raises:
            ProblemError: `command_not_found`, `agent_not_running` and the like. And what every call raises.
        """
        wanted = _wanted(command, env, cwd, timeout, max_output)
        if stdin:
            wanted["stdin"] = base64.b64encode(stdin).decode()
        limit = (_LONGEST_RUN if timeout is None else timeout) + self.timeout + _SPARE
        answer = request(self.location, "POST", _path(agent, "run"), body=wanted, timeout=limit)
        if not isinstance(answer.body, dict):
            raise AnswerInvalid("The daemon's answer is not an object: is something else listening there?")
        return RunResult.from_answer(answer.body)

    def exec(
        self,
        agent: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
        max_output: int | None = None,
        tty: bool = False,
        size: tuple[int, int] | None = None,
        stdin: bool = True,
    ) -> Exec:
        """Start a command in an agent's box; it runs when this returns.

        Args:
            agent: its id.
            command: argv, no shell.
            env: variables beside the agent's own.
            cwd: absolute; default: the agent's own folder.
            timeout: seconds until all of it is killed.
            max_output: bytes passed on of each stream; `truncated` tells that there were more.
            tty: on a terminal of its own.
            size: that terminal's columns and rows.
            stdin: False: it reads an end of file at once.

        Raises:
            ProblemError: `command_not_found`, `agent_not_running` and the like. And what every call raises.
        """
        wanted = _wanted(command, env, cwd, timeout, max_output)
        wanted |= {"tty": tty, "stdin": stdin}
        if size is not None:
            wanted["size"] = {"width": size[0], "height": size[1]}
        path = _path(agent, "exec")
        socket = open_websocket(self.location, path, _PROTOCOL, largest=_LARGEST_MESSAGE, timeout=self.timeout)
        try:
            started = Exec(socket, wanted)
        except BaseException:
            socket.close()
            raise
        self._keep(started)
        return started

    def _keep(self, stream: Exec) -> None:
        """Have it closed with the client."""
        raise NotImplementedError


def _wanted(
    command: Sequence[str],
    env: Mapping[str, str] | None,
    cwd: str | None,
    timeout: float | None,
    max_output: int | None,
) -> dict[str, Any]:
    if isinstance(command, str):
        raise TypeError("command is a list of arguments, such as ['python3', '-V']; no shell reads it")
    given = {"env": dict(env or {}), "cwd": cwd, "timeout": timeout, "max_output": max_output}
    return {"command": list(command), **{key: value for key, value in given.items() if value not in (None, {})}}


def _path(agent: str, act: str) -> str:
    if agent in ("", ".", ".."):
        raise AnswerInvalid(f"{agent!r} names nothing.")
    return f"/v1/agents/{quote(agent, safe='')}/{act}"
