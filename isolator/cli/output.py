"""An agent's output to our own: the very bytes, to the same stream they were written to."""

from __future__ import annotations

import base64
import codecs
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import click

from isolator.cli.text import escape

if TYPE_CHECKING:
    from isolator.client import LogStream

Style = Literal["raw", "escaped", "json"]


def copy_output(stream: LogStream, style: Style = "raw") -> None:
    """Write everything the stream brings, at once as it comes, and close it.

    Raises:
        BrokenPipeError: our reader has gone. And what the stream raises.
    """
    write = writer(style)
    with stream:
        for number, data in stream:
            write(number, data)


def writer(style: Style) -> Callable[[int, bytes], None]:
    """What to call with each piece of output: stream number (1 stdout, 2 stderr) and bytes."""
    if style == "raw":
        targets = {1: sys.stdout.buffer, 2: sys.stderr.buffer}

        def write(number: int, data: bytes) -> None:
            targets[number].write(data)
            targets[number].flush()

    elif style == "escaped":
        # A letter may come in two pieces, so each stream has a decoder that remembers.
        decoders = {number: codecs.getincrementaldecoder("utf-8")("backslashreplace") for number in (1, 2)}

        def write(number: int, data: bytes) -> None:
            click.echo(escape(decoders[number].decode(data), keep="\n\t"), nl=False, err=number == 2)

    else:

        def write(number: int, data: bytes) -> None:
            name = "stdout" if number == 1 else "stderr"
            click.echo(json.dumps({"stream": name, "data": base64.b64encode(data).decode()}))

    return write
