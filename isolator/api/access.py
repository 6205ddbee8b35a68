"""Who may call what. Each rule is a small object; a route without one can't be written down.

The kernel's word about the peer is taken from the connection; nothing a request says changes who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from isolator.api.parts import PARTS
from isolator.identity.peer import principal_of
from isolator.model.errors import Forbidden, NotFound
from isolator.model.identity import Principal
from isolator.model.names import is_agent_id


class Access(Protocol):
    """A rule: returns if the caller may go on, else raises."""

    @property
    def summary(self) -> str:
        """The rule in words."""

    async def check(self, request: web.Request, caller: Principal) -> None:
        """Raises NotFound or Forbidden."""


@dataclass(frozen=True, slots=True)
class AnyPeer:
    """Whoever may connect to the socket. What they see is filtered by owner inside."""

    summary: str = "any peer of the socket; sees only what is theirs"

    async def check(self, request: web.Request, caller: Principal) -> None:
        """Everybody."""
        del request, caller


@dataclass(frozen=True, slots=True)
class TeamOwner:
    """The owner of the team named in the path, or an admin. For others the team does not exist."""

    summary: str = "the team's owner, or an admin"

    async def check(self, request: web.Request, caller: Principal) -> None:
        """Looks the team up."""
        request.app[PARTS].teams.get(request.match_info["team"], caller)


@dataclass(frozen=True, slots=True)
class AgentOwner:
    """The owner of the agent named in the path, or an admin. For others the agent does not exist."""

    summary: str = "the agent's owner, or an admin"

    async def check(self, request: web.Request, caller: Principal) -> None:
        """Looks the agent up among the held ones, then among the records."""
        agent_id = request.match_info["agent"]
        parts = request.app[PARTS]
        if is_agent_id(agent_id):
            live = parts.lifecycle.find(agent_id)
            record = live.record if live is not None else await parts.store.agent(agent_id)
            if record is not None and (caller.is_admin or record.spec.owner == caller.owner):
                if live is not None:
                    live.touch()
                return
        raise NotFound("agent_not_found", "There is no such agent.")


@dataclass(frozen=True, slots=True)
class Admin:
    """root, the daemon's own uid, and the uids the operator named."""

    summary: str = "admins"

    async def check(self, request: web.Request, caller: Principal) -> None:
        """Raises Forbidden: `admin_only`."""
        del request
        if not caller.is_admin:
            raise Forbidden("admin_only", f"uid {caller.uid} is no admin of this daemon (setting admin_uids).")


def caller_of(request: web.Request) -> Principal:
    """Who is at the other end of this request's connection.

    Raises:
        Forbidden: `no_peer`: it is no Unix socket, or already gone.
    """
    connection = None if request.transport is None else request.transport.get_extra_info("socket")
    if connection is None:
        raise Forbidden("no_peer", "The kernel names no peer for this connection.")
    try:
        return principal_of(connection, request.app[PARTS].settings.admin_uids)
    except OSError:
        raise Forbidden("no_peer", "The kernel names no peer for this connection.") from None
