"""What can go wrong between a program and the daemon, each with what to do about it.

    IsolatorClientError
    ├── SocketNotFound    nobody listens: the daemon is not running, or elsewhere
    ├── SocketDenied      the caller may not connect: which group may
    ├── SocketUntrusted   somebody else's process listens where the daemon should
    ├── ConnectionLost    the daemon went away in the middle
    ├── AnswerTimeout     the daemon did not answer in time
    ├── AnswerInvalid     what answered does not speak this API
    └── ProblemError      the daemon answered with a refusal or failure: match on its `code`

`code` is stable here too, so that a program has one thing to match on wherever an error comes from.
"""

from __future__ import annotations

import grp
import stat
from pathlib import Path
from typing import Any, ClassVar

DEFAULT_GROUP = "isolator"


class IsolatorClientError(Exception):
    """Base of everything the client raises of its own accord.

    Attributes:
        code: snake_case, stable.
        detail: a sentence or two for a person: what is wrong and what to do.
    """

    code: str = "client_error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def answer(self) -> dict[str, Any]:
        """The error in JSON: `code` and `detail`, and the problem's own members."""
        return {"code": self.code, "detail": self.detail}


class SocketNotFound(IsolatorClientError):
    """Nobody listens at the socket."""

    code: str = "socket_not_found"

    def __init__(self, path: Path, why: str = "there is no socket") -> None:
        super().__init__(
            f"No daemon at {path}: {why}. Is it running? Start it (systemctl start isolator, or isolator "
            "daemon), or name its socket with ISOLATOR_SOCKET."
        )
        self.path = path


class SocketDenied(IsolatorClientError):
    """The caller may not connect to the socket."""

    code: str = "socket_denied"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.group = _group_of(path)
        if self.group is None:
            detail = (
                f"You may not connect to {path}: only root may. To let others in, make the group {DEFAULT_GROUP} "
                f"(groupadd --system {DEFAULT_GROUP}), restart the daemon, and add them to it."
            )
        else:
            detail = (
                f"You may not connect to {path}: only root and the group {self.group} may. Have yourself added "
                f"(usermod -aG {self.group} USER, as root), then log in again."
            )
        super().__init__(detail)


class SocketUntrusted(IsolatorClientError):
    """The process that listens belongs to neither root nor the caller."""

    code: str = "socket_untrusted"

    def __init__(self, path: Path, uid: int) -> None:
        super().__init__(
            f"{path} is served by uid {uid}, neither root nor you, so nothing was sent to it. If that is "
            "meant, name the socket with ISOLATOR_SOCKET."
        )
        self.path = path
        self.uid = uid


class ConnectionLost(IsolatorClientError):
    """The connection ended before the answer did."""

    code: str = "connection_lost"


class AnswerTimeout(IsolatorClientError):
    """No answer, or no more of it, within the time allowed."""

    code: str = "answer_timeout"


class AnswerInvalid(IsolatorClientError):
    """The answer is none of this API's."""

    code: str = "answer_invalid"


class ProblemError(IsolatorClientError):
    """The daemon's refusal or failure, as problem+json told it.

    Attributes:
        code: the daemon's code, listed in docs/errors.md.
        status: HTTP status.
        title: its class in a few words.
        fields: the case's own members.
    """

    _KNOWN: ClassVar[frozenset[str]] = frozenset({"type", "title", "status", "detail", "code"})

    def __init__(
        self, code: str, status: int, detail: str, fields: dict[str, Any] | None = None, title: str = ""
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = status
        self.title = title
        self.fields: dict[str, Any] = fields or {}

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"

    def answer(self) -> dict[str, Any]:
        """The problem in JSON."""
        return {**self.fields, "code": self.code, "status": self.status, "detail": self.detail}

    @classmethod
    def from_answer(cls, status: int, body: Any) -> ProblemError:
        """The error a problem+json body tells; one that is none still gives one: code `http_<status>`."""
        problem = body if isinstance(body, dict) else {}
        return cls(
            code=str(problem.get("code") or f"http_{status}"),
            status=status,
            detail=str(problem.get("detail") or f"The daemon answered with HTTP status {status}."),
            fields={key: value for key, value in problem.items() if key not in cls._KNOWN},
            title=str(problem.get("title") or ""),
        )


def _group_of(path: Path) -> str | None:
    """The group that may connect; None where only root's own may, which nobody should be told to join.

    Where the folder above is closed too, the default name is all we know.
    """
    try:
        facts = path.stat()
        if facts.st_gid == 0 or not facts.st_mode & stat.S_IWGRP:
            return None
        return grp.getgrgid(facts.st_gid).gr_name
    except (OSError, KeyError):
        return DEFAULT_GROUP
