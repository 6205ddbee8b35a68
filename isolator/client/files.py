"""Files in one agent's mounts: `client.files(agent)`.

Paths are those inside the box, such as `/workspace/notes.txt`: text, or bytes where a name is no UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Final, Protocol, Self
from urllib.parse import quote, unquote_to_bytes

from isolator.client.errors import AnswerInvalid
from isolator.client.location import Location
from isolator.client.transport import Stream, open_stream, refuse_problem, request

_LONG: Final = 120.0
Path = str | bytes


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file, folder or link: size in bytes, mode as permission bits, mtime in RFC 3339.

    name: for people; path: its very bytes; target: where a link leads; etag: what `write` takes as `match`.
    """

    name: str
    path: bytes
    type: str
    size: int
    mode: int
    mtime: str | None
    etag: str
    target: str | None
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> FileInfo:
        """The file a JSON object tells."""
        return cls(
            name=str(answer.get("name") or ""),
            path=unquote_to_bytes(str(answer.get("path") or "")),
            type=str(answer.get("type") or "other"),
            size=int(answer.get("size") or 0),
            mode=int(str(answer.get("mode") or "0"), 8),
            mtime=answer.get("mtime"),
            etag=str(answer.get("etag") or ""),
            target=answer.get("target"),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class FileList:
    """What a folder holds; `truncated` if it holds more than the daemon tells."""

    items: tuple[FileInfo, ...]
    truncated: bool


class FileStream:
    """A file's content as it comes: iterate once for pieces, close to stop early. size: bytes that will come."""

    def __init__(self, size: int, mode: int, stream: Stream) -> None:
        self.size = size
        self.mode = mode
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        """Pieces; ConnectionLost if the file became shorter meanwhile."""
        with self._stream:
            yield from self._stream

    def close(self) -> None:
        """Stop."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Caller(Protocol):
    """What this needs of the client."""

    location: Location
    timeout: float


class AgentFiles:
    """The files of one agent. Raises as every call of the client does."""

    def __init__(self, client: Caller, agent: str) -> None:
        """`agent`: its id."""
        self._client = client
        self._base = f"/v1/agents/{quote(agent, safe='')}/files"

    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytes:
        """The content, or `size` bytes of it from `offset`."""
        if size == 0:
            return b""
        with self.open(path, offset, size) as stream:
            return b"".join(stream)

    def open(self, path: Path, offset: int = 0, size: int | None = None) -> FileStream:
        """The content as a stream; close it, or use it as a context manager."""
        headers = {}
        if offset or size is not None:
            headers["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
        response, stream = open_stream(
            self._client.location, "GET", self._at(path), headers=headers, timeout=self._client.timeout
        )
        refuse_problem(response, stream)
        return FileStream(response.length or 0, int(response.getheader("X-Isolator-Mode") or "0", 8), stream)

    def write(
        self,
        path: Path,
        content: bytes | IO[bytes],
        *,
        mode: int | None = None,
        exclusive: bool = False,
        parents: bool = False,
        match: str | None = None,
    ) -> FileInfo:
        """Write a file, whole or not at all.

        Args:
            path: where.
            content: bytes, or a file that is open for reading and is sent from where it stands.
            mode: permission bits; None keeps those of the file that is there, a new one gets 0644.
            exclusive: only if nothing is there, else ProblemError `file_exists`.
            parents: make missing folders.
            match: an ETag; ProblemError `file_changed` if the file is another by now.
        """
        query = {
            "mode": None if mode is None else f"{mode:04o}",
            "exclusive": exclusive or None,
            "parents": parents or None,
        }
        headers = {"Content-Type": "application/octet-stream", **({} if match is None else {"If-Match": match})}
        return self._told("PUT", path, query, content, headers)

    def list(self, path: Path = "/") -> FileList:
        """What a folder holds; for `/`, the agent's mounts."""
        body = _object(self._call("GET", path, {"list": "1"}))
        items = body.get("items")
        if not isinstance(items, list):
            raise AnswerInvalid("The daemon's answer holds no items: is something else listening there?")
        found = tuple(FileInfo.from_answer(item) for item in items if isinstance(item, dict))
        return FileList(found, bool(body.get("truncated")))

    def stat(self, path: Path) -> FileInfo:
        """The facts of a file, folder or link; a link is not followed."""
        return self._told("GET", path, {"stat": "1"})

    def make_folder(self, path: Path, *, parents: bool = False) -> FileInfo:
        """Make a folder; with `parents` those above it too, and one that is there is fine."""
        return self._told("POST", path, {"mkdir": "1", "parents": parents or None})

    def rename(self, path: Path, new: Path, *, replace: bool = True) -> FileInfo:
        """Move within one mount; without `replace` only if nothing is there."""
        return self._told("POST", path, {"rename": _quoted(new), "replace": replace})

    def copy(self, path: Path, new: Path, *, replace: bool = True, parents: bool = False) -> FileInfo:
        """Copy a plain file, its permissions too."""
        return self._told("POST", path, {"copy": _quoted(new), "replace": replace, "parents": parents or None})

    def remove(self, path: Path, *, recursive: bool = False) -> None:
        """Remove a file, a link, an empty folder; with `recursive` a folder with all it holds."""
        self._call("DELETE", path, {"recursive": recursive or None})

    def _told(self, method: str, path: Path, *more: Any) -> FileInfo:
        return FileInfo.from_answer(_object(self._call(method, path, *more)))

    def _call(
        self,
        method: str,
        path: Path,
        query: Mapping[str, str | bool | None],
        content: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        # Paths are quoted already, byte by byte: they go into the address as they are.
        said = "&".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in query.items()
            if value is not None
        )
        at = self._at(path) + (f"?{said}" if said else "")
        return request(self._client.location, method, at, content=content, headers=headers, timeout=_LONG).body

    def _at(self, path: Path) -> str:
        return self._base + _quoted(path)


def _quoted(path: Path) -> str:
    """An absolute path as an address has it."""
    text = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    if not text.startswith(b"/"):
        raise AnswerInvalid(f"{path!r} is not absolute: name it as it is inside the box, such as /workspace/file.")
    return quote(text, safe="/")


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise AnswerInvalid("The daemon's answer is not an object: is something else listening there?")
    return body
