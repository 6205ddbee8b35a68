"""An agent's row: its record as text, the columns it is found by, and the number of its removal."""

from __future__ import annotations

import sqlite3

from isolator.model.agent import Agent
from isolator.store.records import dump_agent

# A number, not a time: it orders removals even when somebody sets the clock.
_INSERT = """
    INSERT INTO agent (id, team, name, owner, session, state, created_at, finished_at, record, removal)
    VALUES (:id, :team, :name, :owner, :session, :state, :created_at, :finished_at, :record,
        CASE WHEN :state = 'removed'
        THEN (SELECT coalesce(max(removal), 0) + 1 FROM agent WHERE removal IS NOT NULL) END)
"""
_UPDATE = """
    UPDATE agent SET team = :team, name = :name, owner = :owner, session = :session, state = :state,
        created_at = :created_at, finished_at = :finished_at, record = :record,
        removal = CASE WHEN :state = 'removed' THEN coalesce(removal,
            (SELECT coalesce(max(removal), 0) + 1 FROM agent WHERE removal IS NOT NULL)) END
    WHERE id = :id
"""
_PRUNE = """
    DELETE FROM agent WHERE removal <= (
        SELECT removal FROM agent WHERE removal IS NOT NULL ORDER BY removal DESC LIMIT 1 OFFSET ?
    )
"""


def write_agent(connection: sqlite3.Connection, agent: Agent, *, insert: bool) -> None:
    """Add a row, or write over the one that is there.

    Raises:
        sqlite3.IntegrityError: the name is taken.
    """
    values = {
        "id": agent.id,
        "team": agent.spec.team,
        "name": agent.spec.name,
        "owner": agent.spec.owner,
        "session": agent.spec.session,
        "state": agent.state,
        "created_at": agent.created_at,
        "finished_at": agent.finished_at,
        "record": dump_agent(agent),
    }
    connection.execute(_INSERT if insert else _UPDATE, values)


def prune_removed(connection: sqlite3.Connection, kept: int) -> None:
    """Drop all but `kept` records of removed agents: those removed longest ago go.

    Counted from the removal, not from the spawn or the end: else a neighbour's many short-lived agents would push
    out the record of a long-lived one in the very moment of its own removal. A lost agent is not removed yet.
    """
    connection.execute(_PRUNE, (kept,))
