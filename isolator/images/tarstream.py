"""A reader of untrusted tar streams: one header at a time, refusing what two readers could read apart.

`tarfile` is not used on purpose: it loads extended headers of any size into memory and forgives a lot. What
matters here is that the engine and this reader see the same tree; so unusual headers end the reading
instead of being guessed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

_BLOCK = 512
_CHUNK = 256 * 1024
_MAX_EXTENDED = 256 * 1024
_MAX_NAME = 4096
_MAX_TRAILING = 64 * 1024 * 1024


class TarError(ValueError):
    """The stream is malformed, unusual, or over a bound; says which."""


class Readable(Protocol):
    """Where bytes come from."""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""


class ChunkReader:
    """Reads exact sizes from an iterator of chunks and counts against a budget.

    Args:
        chunks: any sizes, empty ones too.
        budget: called with the number of bytes of every chunk; raises when too much was read.
    """

    def __init__(self, chunks: Iterator[bytes], budget: Callable[[int], None]) -> None:
        self._chunks = chunks
        self._budget = budget
        self._held = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        parts: list[memoryview] = []
        missing = size
        while missing:
            if not self._held:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._budget(len(chunk))
                self._held = memoryview(chunk)
            parts.append(self._held[:missing])
            self._held = self._held[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)


class Member:
    """One entry; its content can be read until the next entry is asked for.

    Attributes:
        name: as written, not cleaned.
        kind: the type flag: "0" file, "1" hard link, "2" symbolic link, "3" "4" device, "5" folder, "6" pipe.
        link: target of a link.
        mode: permission bits.
        size: of the content, bytes.
    """

    def __init__(self, *, name: str, kind: str, link: str, mode: int, size: int, source: Readable) -> None:
        self.name, self.kind, self.link, self.mode, self.size = name, kind, link, mode, size
        self._source = source
        self._left = size

    def resize(self, size: int) -> None:
        """Take an extended header's word for the size, before anything is read."""
        self.size = self._left = size

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the content; empty at its end.

        Raises:
            TarError: the stream ends before the content does.
        """
        wanted = min(size, self._left)
        data = self._source.read(wanted)
        if len(data) < wanted:
            raise TarError("the archive ends in the middle of a file")
        self._left -= wanted
        return data

    def chunks(self) -> Iterator[bytes]:
        """The rest of the content."""
        while self._left:
            yield self.read(_CHUNK)

    def skip(self) -> None:
        """Pass over the rest of the content and its padding."""
        for _ in self.chunks():
            pass
        padding = -self.size % _BLOCK
        if len(self._source.read(padding)) < padding:
            raise TarError("the archive ends in the middle of a file")


@dataclass(slots=True)
class _Extended:
    """What extended headers said about the next entry."""

    name: str | None = None
    link: str | None = None
    size: int | None = None
    seen: bool = False


def read_members(source: Readable) -> Iterator[Member]:
    """Every entry of an uncompressed tar, in order.

    Raises:
        TarError: see the class.
    """
    extended = _Extended()
    while True:
        block = source.read(_BLOCK)
        if not block or block == bytes(_BLOCK):
            _demand_nothing_follows(source)
            if extended.seen:
                raise TarError("an extended header has no entry")
            return
        member = _parse(block, source)
        if member.kind in {"x", "L", "K"}:
            _extend(extended, member)
            continue
        if member.kind == "g":
            # Global records may not change how entries are read; a comment (git writes one) is harmless.
            if set(_records(_content(member))) - {"comment"}:
                raise TarError("a global extended header")
            continue
        _complete(member, extended)
        extended = _Extended()
        yield member
        member.skip()


def _complete(member: Member, extended: _Extended) -> None:
    """Lay the extended headers over the entry and refuse what readers disagree on."""
    if member.kind not in {"0", "1", "2", "3", "4", "5", "6"}:
        raise TarError(f"an entry of unknown type {member.kind!r}")
    if extended.size is not None:
        member.resize(extended.size)
    if member.kind != "0" and member.size:
        raise TarError("a link, folder or device with content")
    member.name = member.name if extended.name is None else extended.name
    member.link = member.link if extended.link is None else extended.link
    if member.kind == "0" and member.name.endswith("/"):
        # Old archives mark a folder by this alone.
        raise TarError("a file whose name ends in a slash")


def gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompressed pieces of bounded size.

    Raises:
        TarError: damaged, or more than one stream.
    """
    decoder = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        data, full = chunk, False
        # A full piece may leave more to come out without more going in.
        while (data or full) and not decoder.eof:
            try:
                piece = decoder.decompress(data, _CHUNK)
            except zlib.error as error:
                raise TarError("a damaged compressed layer") from error
            data, full = decoder.unconsumed_tail, len(piece) == _CHUNK
            yield piece
        if decoder.eof and (decoder.unused_data or data):
            raise TarError("bytes after the end of a compressed layer")
    if not decoder.eof:
        raise TarError("a compressed layer that ends early")


def _parse(block: bytes, source: Readable) -> Member:
    if len(block) < _BLOCK:
        raise TarError("the archive ends in the middle of a header")
    if _number(block[148:156]) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise TarError("a header with a wrong checksum")
    name, magic = _text(block[:100]), block[257:265]
    if magic == b"ustar\x0000":
        # The POSIX layout splits long names; star's variant of it ends in "tar\0" and splits elsewhere.
        if block[508:512] == b"tar\x00":
            raise TarError("a header of star's format")
        prefix = _text(block[345:500])
        name = f"{prefix}/{name}" if prefix else name
    elif magic not in {b"ustar  \x00", bytes(8)}:
        raise TarError("a header of unknown format")
    kind = chr(block[156]) if block[156] else "0"
    if kind == "7":
        kind = "0"
    size = _number(block[124:136])
    return Member(
        name=name,
        kind=kind,
        link=_text(block[157:257]),
        mode=_number(block[100:108]) & 0o7777,
        size=size,
        source=source,
    )


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        # Base-256, for what octal digits can't hold. The first byte 0xff would be negative.
        if field.startswith(b"\xff"):
            raise TarError("a negative number")
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if value >= 1 << 62:
            raise TarError("a number out of range")
        return value
    digits = field.strip(b" \x00")
    if digits.strip(b"01234567"):
        raise TarError("a malformed number")
    return int(digits, 8) if digits else 0


def _text(field: bytes) -> str:
    return field.split(b"\x00", 1)[0].decode("utf-8", "surrogateescape")


def _content(member: Member) -> bytes:
    if member.size > _MAX_EXTENDED:
        raise TarError("an extended header that is too long")
    data = member.read(member.size)
    member.skip()
    return data


def _extend(extended: _Extended, member: Member) -> None:
    data = _content(member)
    extended.seen = True
    if member.kind == "x":
        records = _records(data)
        if any(key.startswith("GNU.sparse") for key in records):
            raise TarError("a sparse file")
        _set(extended, "name", records.get("path"))
        _set(extended, "link", records.get("linkpath"))
        if "size" in records:
            if not re.fullmatch(r"[0-9]{1,18}", records["size"]):
                raise TarError("a malformed size")
            extended.size = int(records["size"])
    else:
        text = data.removesuffix(b"\x00").decode("utf-8", "surrogateescape")
        _set(extended, "name" if member.kind == "L" else "link", text)


def _set(extended: _Extended, field: str, value: str | None) -> None:
    if value is None:
        return
    if getattr(extended, field) is not None:
        raise TarError("two extended headers that name the same entry")
    if not value or "\x00" in value or len(value) > _MAX_NAME:
        raise TarError("a malformed name in an extended header")
    setattr(extended, field, value)


def _records(data: bytes) -> dict[str, str]:
    """PAX records: length, space, key=value, newline; the length counts all of it."""
    records: dict[str, str] = {}
    while data:
        head, space, _ = data[:20].partition(b" ")
        if not space or not head.isdigit() or not 0 < (length := int(head)) <= len(data):
            raise TarError("a malformed extended header")
        record, data = data[len(head) + 1 : length], data[length:]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise TarError("a malformed extended header")
        name = key.decode("utf-8", "surrogateescape")
        if name in records:
            raise TarError("an extended header that says something twice")
        records[name] = value[:-1].decode("utf-8", "surrogateescape")
    return records


def _demand_nothing_follows(source: Readable) -> None:
    """Only zeros may follow the end mark: readers disagree on whether to go on there."""
    total = 0
    while data := source.read(_CHUNK):
        total += len(data)
        if data.count(0) != len(data) or total > _MAX_TRAILING:
            raise TarError("data after the end of the archive")
