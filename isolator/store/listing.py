"""Lists of agents, a page at a time: no answer may grow with how many agents there are, or how large their records.

The order is `created_at`, then the id. Neither ever changes, so an agent that is there from the first page to the
last is on exactly one of them, whatever comes and goes meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import math
import sqlite3
import struct
from dataclasses import dataclass
from typing import get_args

from isolator.model.agent import Agent, State
from isolator.model.names import is_agent_id
from isolator.store.records import load_agent

HELD_STATES: tuple[State, ...] = tuple(state for state in get_args(State) if state != "removed")
PAGE_BYTES = 4 * 1024**2
_MOMENT = struct.Struct(">d")


@dataclass(frozen=True, slots=True)
class Place:
    """The end of a page: right after this agent, which need not exist any more."""

    created_at: float
    agent: str

    def text(self) -> str:
        """It as a short word for callers, who need not know what is in it."""
        return base64.urlsafe_b64encode(_MOMENT.pack(self.created_at) + self.agent.encode()).decode()

    @classmethod
    def from_text(cls, text: str) -> Place:
        """The place `text` is the word for. Raises ValueError: it is none that `text()` gives."""
        content = base64.b64decode(text, altchars=b"-_", validate=True)
        if len(content) <= _MOMENT.size:
            raise ValueError("too short")
        place = cls(_MOMENT.unpack_from(content)[0], content[_MOMENT.size :].decode("ascii"))
        if not math.isfinite(place.created_at) or not is_agent_id(place.agent) or place.text() != text:
            raise ValueError("not one of ours")
        return place


@dataclass(frozen=True, slots=True)
class Page:
    """Some agents, oldest first, and where the following page begins; None: this one is the last."""

    agents: list[Agent]
    next: Place | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which agents: those that match all that is given."""

    states: tuple[State, ...] | None = None
    team: str | None = None
    session: str | None = None
    owner: str | None = None


def read_page(connection: sqlite3.Connection, wanted: Wanted, after: Place | None, limit: int, most_bytes: int) -> Page:
    """The page after a place: at most `limit` agents, and records of `most_bytes` together unless one alone has more.

    Row by row: what is not on the page is never in memory.
    """
    clauses: list[str] = []
    values: list[str | float] = []
    if wanted.states is not None:
        clauses.append(f"state IN ({','.join('?' * len(wanted.states))})")
        values.extend(wanted.states)
    for column, value in (("team", wanted.team), ("session", wanted.session), ("owner", wanted.owner)):
        if value is not None:
            clauses.append(f"{column} = ?")
            values.append(value)
    if after is not None:
        clauses.append("(created_at, id) > (?, ?)")
        values.extend((after.created_at, after.agent))
    where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
    # By any other index the records would have to be sorted first, all of them.
    statement = f"SELECT record FROM agent INDEXED BY agent_listing {where} ORDER BY created_at, id"  # noqa: S608 - fixed names
    agents: list[Agent] = []
    size = 0
    with contextlib.closing(connection.execute(statement, values)) as rows:
        for (record,) in rows:
            size += len(record)  # bytes as well: `dump_agent` writes ASCII
            if agents and (len(agents) >= limit or size > most_bytes):
                return Page(agents, Place(agents[-1].created_at, agents[-1].id))
            agents.append(load_agent(record))
    return Page(agents, None)
