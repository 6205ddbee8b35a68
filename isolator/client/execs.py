"""A command in a running agent's box, as a program sees it: its streams while it runs, and how it ended."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from isolator.client.errors import AnswerInvalid, ConnectionLost, ProblemError
from isolator.client.frames import TEXT
from isolator.client.websocket import WebSocket

STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
_PIECE: Final = 64 * 1024
_START_TIMEOUT: Final = 30.0
_STATUS_WORDS: Final = frozenset(
    {"reason", "message", "details", "exit_code", "signal", "timed_out", "oom_killed", "truncated", "http_status"}
)


@dataclass(frozen=True, slots=True)
class ExecStatus:
    """How a command ended.

    exit_code: 128 + signal if one ended it; signal: its number, or None; timed_out: its timeout was over and all of
    it was killed; oom_killed: the kernel killed it for memory; truncated: output was dropped at max_output;
    reason: `Timeout`, `AgentEnded` and the like, or None.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool
    oom_killed: bool
    truncated: bool
    reason: str | None = None

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> ExecStatus:
        """The status a JSON object tells."""
        return cls(**_figures(answer), reason=answer.get("reason"))


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a command ended, as `ExecStatus` says it, and everything it wrote; duration in seconds."""

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    timed_out: bool
    oom_killed: bool
    truncated: bool
    duration: float

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> RunResult:
        """The result a JSON object tells. Raises AnswerInvalid: its output is not base64."""
        try:
            stdout, stderr = (base64.b64decode(answer.get(name) or "", validate=True) for name in ("stdout", "stderr"))
        except (binascii.Error, ValueError, TypeError):
            raise AnswerInvalid("The daemon's answer holds output that is not base64.") from None
        return cls(**_figures(answer), stdout=stdout, stderr=stderr, duration=float(answer.get("duration") or 0))


class Exec:
    """A command that runs. Leaving it as a context manager before its end kills it with all that came of it.

    One thread may iterate while others write, resize and signal.
    """

    def __init__(self, socket: WebSocket, wanted: Mapping[str, Any]) -> None:
        """Start it, on a fresh connection.

        Raises:
            ProblemError: the daemon refused. ConnectionLost, AnswerTimeout, AnswerInvalid.
        """
        self._socket = socket
        self._status: ExecStatus | None = None
        self._ended = threading.Event()
        self._reader: int | None = None
        # The command has closed its standard input; told to whoever iterates, by `on_stdin_closed` too.
        self.stdin_closed = False
        self.on_stdin_closed: Callable[[], None] | None = None
        socket.send_text(json.dumps(wanted))
        self.pid = self._started()

    def _started(self) -> int:
        message = self._socket.receive(_START_TIMEOUT)
        if message is None:
            raise ConnectionLost("The daemon hung up before the command ran.")
        if message.opcode != TEXT:
            if message.data[:1] == bytes((STATUS,)):
                _refuse(_decoded(message.data[1:]))
            raise AnswerInvalid("The daemon did not say that the command was started.")
        started = _decoded(message.data).get("started")
        if not isinstance(started, dict) or not isinstance(started.get("pid"), int):
            raise AnswerInvalid("The daemon did not say that the command was started.")
        pid: int = started["pid"]
        return pid

    # its output

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """What it writes, as it comes: (1 stdout or 2 stderr, bytes); with a terminal all of it is 1. Iterate once.

        Whoever does not go on holds the command up, as a full pipe does.

        Raises:
            ConnectionLost: the daemon went away. AnswerInvalid. ProblemError: the daemon failed.
        """
        self._reader = threading.get_ident()
        try:
            while self._status is None:
                message = self._socket.receive()
                if message is None:
                    raise ConnectionLost("The daemon hung up before the command's end.")
                if message.opcode == TEXT or not message.data:
                    continue
                channel, data = message.data[0], message.data[1:]
                if channel == STATUS:
                    self._end(_decoded(data))
                elif channel in (STDOUT, STDERR) and data:
                    yield channel, data
                elif channel == CLOSE and data[:1] == bytes((STDIN,)):
                    self.stdin_closed = True
                    if self.on_stdin_closed is not None:
                        self.on_stdin_closed()
        finally:
            self._reader = None
            self._ended.set()

    def _end(self, answer: dict[str, Any]) -> None:
        _refuse(answer)
        self._status = ExecStatus.from_answer(answer)
        self._socket.close()

    def wait(self) -> ExecStatus:
        """Wait for its end. Output that nobody iterates over is dropped.

        Raises:
            As iterating. ConnectionLost also where another thread, which iterated, stopped before the end.
        """
        if self._reader in (None, threading.get_ident()):
            for _ in self:
                pass
        self._ended.wait()
        if self._status is None:
            raise ConnectionLost("The command's output was left before its end, which is thus not known.")
        return self._status

    # its input

    def write(self, data: bytes) -> None:
        """Its standard input; waits while it does not read.

        Raises:
            BrokenPipeError: it has ended, or the daemon went away, which `wait` tells apart.
        """
        rest = memoryview(data)
        while rest:
            if self.stdin_closed:
                raise BrokenPipeError("the command takes no more input")
            try:
                self._socket.send_binary(bytes((STDIN,)), rest[:_PIECE])
            except ConnectionLost as error:
                raise BrokenPipeError("the command takes no more input") from error
            rest = rest[_PIECE:]

    def close_stdin(self) -> None:
        """End of file on its standard input; its output goes on. A terminal has no half to close. Never raises."""
        with contextlib.suppress(ConnectionLost):
            self._socket.send_binary(bytes((CLOSE, STDIN)))

    def close_output(self, stream: int) -> None:
        """Nobody reads its stdout (1) or stderr (2) here any more: it is told so if it writes there. Never raises."""
        with contextlib.suppress(ConnectionLost):
            self._socket.send_binary(bytes((CLOSE, stream)))

    def resize(self, width: int, height: int) -> None:
        """Set its terminal's columns and rows. Never raises: at its end there is nothing to resize."""
        size = json.dumps({"Width": width, "Height": height}).encode()
        with contextlib.suppress(ConnectionLost):
            self._socket.send_binary(bytes((RESIZE,)), size, patient=False)

    def signal(self, number: int) -> None:
        """Send a signal to its process group; with a terminal, as the keys do, to the foreground's. Never raises.

        Does not wait behind input that the command does not read.
        """
        with contextlib.suppress(ConnectionLost):
            self._socket.send_text(json.dumps({"signal": int(number)}))

    def close(self) -> None:
        """Hang up: if it still runs, it and all that came of it is killed."""
        self._socket.close()
        self._ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _figures(answer: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: answer.get(key) for key in ("exit_code", "signal")}
    if not all(value is None or isinstance(value, int) for value in numbers.values()):
        raise AnswerInvalid("The daemon tells an end of the command that is none.")
    return {**numbers, **{key: answer.get(key) is True for key in ("timed_out", "oom_killed", "truncated")}}


def _decoded(text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise AnswerInvalid("The daemon sent a message that is no JSON object: is something else listening there?")
    return answer


def _refuse(status: dict[str, Any]) -> None:
    """Raise what a status of failure tells, if it is isolator's and not the command's own. Raises ProblemError."""
    if isinstance(status.get("code"), str):
        number = status.get("http_status")
        told = number if isinstance(number, int) else 500
        known = {key: value for key, value in status.items() if key not in _STATUS_WORDS}
        raise ProblemError.from_answer(told, known)
