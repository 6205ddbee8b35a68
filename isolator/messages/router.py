"""Who may send whom a message, and as whom: the sender is the socket's agent, the receiver one of its own team."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Protocol

from isolator.messages.envelope import Address, Bounds, seal
from isolator.messages.mailbox import Subscription, Ticket
from isolator.messages.mailroom import Dropped, Mailroom
from isolator.messages.progress import Peer, ProgressDesk
from isolator.messages.talk import Watch
from isolator.model.errors import Conflict, NotFound
from isolator.model.message import GATEWAY, PROGRESS, AgentMessage, MessageRequest
from isolator.store.mail import Mail


class Directory(Protocol):
    """Who is there."""

    def find(self, agent: str) -> Peer | None:
        """The agent of that id that is held."""

    def named(self, team: str, name: str) -> Peer | None:
        """The live agent of that name in the team."""


class Router:
    """The one way in and out of the mailboxes."""

    def __init__(
        self, mail: Mail, bounds: Bounds, directory: Directory, progress: ProgressDesk, dropped: Dropped
    ) -> None:
        """Call `load` before anything else."""
        self.bounds = bounds
        self.mailroom = Mailroom(mail, bounds, dropped)
        self._directory = directory
        self._progress = progress
        # Numbers begin with the clock, so that they go on growing after a restart.
        self._first_number = int(time.time() * 1e6)
        self._numbers: dict[str, int] = {}

    async def load(self) -> None:
        """Find what an earlier daemon kept; what nobody can receive any more is dropped."""
        await self.mailroom.load()

    async def close(self) -> None:
        """Part from all receivers; what is kept stays."""
        await self.mailroom.close()
        await self._progress.close()

    # sending

    def from_agent(self, agent: str, message: AgentMessage, watch: Watch | None = None) -> Ticket:
        """Send a message of this agent, as the socket named it.

        Raises:
            NotFound: `receiver_not_found`: none of its team is called so. TooMany: `mailbox_full`.
            TooLarge: `message_too_large`. BadRequest: `invalid_json`, `invalid_request`, `unknown_field`.
        """
        sender = self._directory.find(agent)
        if sender is None:
            raise NotFound("receiver_not_found", "You are not there any more.")
        if message.to != GATEWAY:
            receiver = self._teammate(sender.team, message.to)
            return self._send(Address(receiver, "agent"), agent, receiver, message, watch)
        if message.type == PROGRESS:
            self._progress.report(sender, message.body)
            ticket = Ticket(secrets.token_hex(8), watch)
            ticket.become("delivered")
            return ticket
        return self._send(Address(agent, "gateway"), agent, GATEWAY, message, watch)

    def from_gateway(self, agent: str, message: MessageRequest, watch: Watch | None = None) -> Ticket:
        """Send a message of the gateway to this agent.

        Raises:
            Conflict: `agent_not_running`. TooMany: `mailbox_full`. TooLarge: `message_too_large`.
            BadRequest: `invalid_json`.
        """
        peer = self._directory.find(agent)
        if peer is None or not peer.running:
            raise Conflict("agent_not_running", "The agent does not run, so it receives nothing.")
        peer.touch()
        return self._send(Address(agent, "agent"), GATEWAY, agent, message, watch)

    def _teammate(self, team: str, name: str) -> str:
        found = self._directory.find(name)
        if found is None or found.team != team:
            found = self._directory.named(team, name)
        if found is None or not found.running:
            # Absent, another team's and another owner's are told alike.
            raise NotFound("receiver_not_found", "There is no such agent in your team.")
        found.touch()
        return found.id

    def _send(
        self, address: Address, sender: str, receiver: str, message: MessageRequest, watch: Watch | None
    ) -> Ticket:
        number = secrets.token_hex(8)
        key = sender if sender != GATEWAY else f"{GATEWAY}/{receiver}"
        sequence = self._numbers.get(key, self._first_number) + 1
        envelope = seal(
            message,
            number=number,
            sender=sender,
            receiver=receiver,
            sequence=sequence,
            now=time.time(),
            bounds=self.bounds,
        )
        ticket = Ticket(number, watch)
        self.mailroom.deliver(address, envelope, ticket)
        self._numbers[key] = sequence
        return ticket

    # receiving

    def subscribe(self, address: Address, hand: Callable[[bytes], None], gone: Callable[[], None]) -> Subscription:
        """Receive what comes for an address, as lines; of several who do, the oldest gets all.

        Raises:
            NotFound: `agent_not_found`: it is no more. Unavailable: `daemon_stopping`.
        """
        if self._directory.find(address.agent) is None:
            raise NotFound("agent_not_found", "There is no such agent.")
        return self.mailroom.subscribe(address, hand, gone)

    def kept(self, address: Address) -> int:
        """How many messages wait there."""
        return self.mailroom.kept(address)

    # ending

    def agent_ended(self, agent: str) -> None:
        """It runs no more: what waits for it is dropped. What it sent to its gateway stays until it is removed."""
        self.mailroom.end(Address(agent, "agent"))

    def agent_removed(self, agent: str) -> None:
        """It is forgotten: what its gateway did not fetch is dropped, and its gateway's connections end."""
        self.mailroom.end(Address(agent, "agent"))
        self.mailroom.end(Address(agent, "gateway"))
        self._numbers.pop(agent, None)
        self._numbers.pop(f"{GATEWAY}/{agent}", None)
