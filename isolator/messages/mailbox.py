"""What becomes of one message (`Ticket`), whoever receives (`Subscription`), and one receiver's queue (`Mailbox`).

The messages of a queue are in the store alone; here is only how many they are. A receiver is given messages up to a
window and gets more as it acknowledges, so that a slow one costs a window of memory and no more.
"""

from __future__ import annotations

from collections.abc import Callable

from isolator.messages.envelope import Address
from isolator.model.errors import IsolatorError
from isolator.model.message import State
from isolator.store.mail import Room

WINDOW = 32
WINDOW_BYTES = 512 * 1024
_SETTLED: frozenset[State | None] = frozenset({"delivered", "unacknowledged", "expired", "dropped"})


class Ticket:
    """One message on its way. `watch` is told of each change; it must not wait or raise."""

    __slots__ = ("__weakref__", "error", "id", "state", "watch")

    def __init__(self, number: str, watch: Callable[[Ticket], None] | None) -> None:
        """Nothing has become of it yet."""
        self.id = number
        self.state: State | None = None
        self.error: IsolatorError | None = None
        self.watch = watch

    @property
    def settled(self) -> bool:
        """Whether nothing more will become of it."""
        return self.error is not None or self.state in _SETTLED

    def become(self, state: State) -> None:
        """Note and tell."""
        self.state = state
        if self.watch is not None:
            self.watch(self)

    def fail(self, error: IsolatorError) -> None:
        """It could not be kept."""
        self.error = error
        if self.watch is not None:
            self.watch(self)


class Subscription:
    """A receiver's connection. `hand(line)` must buffer and return; `gone()` says that its agent is no more."""

    def __init__(
        self,
        mailbox: Mailbox,
        hand: Callable[[bytes], None],
        gone: Callable[[], None],
        changed: Callable[[Mailbox], None],
    ) -> None:
        """Use `Router.subscribe`; `changed` is told when there is room again, and when it leaves."""
        self._mailbox = mailbox
        self._hand = hand
        self.gone = gone
        self._changed = changed
        self._held: dict[str, tuple[int, Ticket]] = {}
        self.held_bytes = 0

    def room(self) -> Room:
        """How much may be handed over now."""
        return Room(WINDOW - len(self._held), WINDOW_BYTES - self.held_bytes, at_least_one=not self._held)

    def fits(self, size: int) -> bool:
        """Whether a message of that size may be handed over now; any does while none waits for its acknowledgement."""
        return not self._held or (len(self._held) < WINDOW and self.held_bytes + size <= WINDOW_BYTES)

    def give(self, line: bytes, ticket: Ticket) -> None:
        """Hand a message over."""
        self._held[ticket.id] = (len(line), ticket)
        self.held_bytes += len(line)
        self._hand(line)
        ticket.become("sent")

    def acknowledge(self, number: object) -> bool:
        """The receiver has it; False if it was not given that one, or has said so before."""
        found = self._held.pop(number, None) if isinstance(number, str) else None
        if found is None:
            return False
        size, ticket = found
        self.held_bytes -= size
        ticket.become("delivered")
        self._changed(self._mailbox)
        return True

    def acknowledge_all(self) -> None:
        """The receiver has everything it was given."""
        for number in list(self._held):
            self.acknowledge(number)

    def leave(self) -> None:
        """Take no more; what it has may still be acknowledged."""
        if self in self._mailbox.receivers:
            self._mailbox.receivers.remove(self)
            self._changed(self._mailbox)

    def close(self) -> None:
        """The connection ended: what it did not acknowledge is not sent again to anybody."""
        held, self._held, self.held_bytes = self._held, {}, 0
        for _, ticket in held.values():
            ticket.become("unacknowledged")
        self.leave()


class Mailbox:
    """One receiver: its connections, the oldest first, and how much is kept for it.

    count, size: messages and bytes kept, those still being written (`writing`) included; taking: some are being
    fetched from the store just now; resting: the store refused that a moment ago; closed: its agent is no more.
    """

    __slots__ = ("address", "closed", "count", "receivers", "resting", "size", "taking", "writing")

    def __init__(self, address: Address) -> None:
        """Empty."""
        self.address = address
        self.receivers: list[Subscription] = []
        self.count = 0
        self.size = 0
        self.writing = 0
        self.taking = False
        self.resting = False
        self.closed = False

    @property
    def receiver(self) -> Subscription | None:
        """Who gets the messages: the oldest connection. The others take over when it ends."""
        return self.receivers[0] if self.receivers else None

    @property
    def direct(self) -> bool:
        """Whether a new message would overtake none."""
        return self.count == 0 and not self.taking

    @property
    def unused(self) -> bool:
        """Whether nobody would miss it."""
        return self.direct and not self.receivers
