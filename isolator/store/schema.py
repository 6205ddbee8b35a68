"""The database's tables, and how an older one becomes today's. Nobody outside `store` writes SQL."""

from __future__ import annotations

import sqlite3

from isolator.model.errors import Unavailable

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE team (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        subnet TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        network_id TEXT
    ) STRICT;
    CREATE TABLE agent (
        id TEXT PRIMARY KEY,
        team TEXT NOT NULL,
        name TEXT NOT NULL,
        owner TEXT NOT NULL,
        session TEXT,
        state TEXT NOT NULL,
        created_at REAL NOT NULL,
        finished_at REAL,
        record TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX agent_name ON agent (team, name) WHERE state IN ('creating', 'running', 'stopping');
    CREATE INDEX agent_state ON agent (state);
    CREATE INDEX agent_team ON agent (team);
    CREATE TABLE idempotency (
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        request TEXT NOT NULL,
        agent TEXT NOT NULL,
        created_at REAL NOT NULL,
        PRIMARY KEY (owner, key)
    ) STRICT;
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        type TEXT NOT NULL,
        owner TEXT,
        team TEXT,
        agent TEXT,
        data TEXT NOT NULL
    ) STRICT;
    CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    """,
    # removal: 1 for the agent that was removed first, and so on; NULL until then. The index for lists has every
    # column they choose by, so that what is not chosen costs no look at its record.
    """
    ALTER TABLE agent ADD COLUMN removal INTEGER;
    UPDATE agent SET removal = numbered.removal FROM (
        SELECT id, row_number() OVER (ORDER BY coalesce(finished_at, created_at), id) AS removal
        FROM agent WHERE state = 'removed'
    ) AS numbered WHERE agent.id = numbered.id;
    CREATE INDEX agent_removal ON agent (removal) WHERE removal IS NOT NULL;
    CREATE INDEX agent_listing ON agent (created_at, id, state, team, session, owner);
    """,
    # Messages for receivers that are not there. `number` is their order, and never that of another message.
    """
    CREATE TABLE mail (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        agent TEXT NOT NULL,
        side TEXT NOT NULL,
        id TEXT NOT NULL,
        line BLOB NOT NULL,
        expires_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX mail_queue ON mail (agent, side, number);
    CREATE INDEX mail_expiry ON mail (expires_at);
    """,
)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to today's schema, one transaction a step.

    Raises:
        Unavailable: `store_newer`.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise Unavailable(
            "store_newer",
            f"The database is of a newer isolator (schema {version}). Upgrade isolator, or name another state_dir.",
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
