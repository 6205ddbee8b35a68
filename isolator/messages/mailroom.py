"""The mailboxes: what is handed over, what is kept meanwhile, in which order, and what becomes of it.

A message goes straight to a receiver that is connected and has room: no disk, for nothing of it must survive.
Otherwise it is stored before its sender is told `queued`, and deleted from the store before it is handed out: a
daemon that is killed repeats none. A message never overtakes one that is kept for the same receiver.

There is no task, timer or descriptor for an agent that has no connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from isolator.messages.envelope import Address, Bounds, Envelope
from isolator.messages.mailbox import Mailbox, Subscription, Ticket
from isolator.model.errors import IsolatorError, TooMany, Unavailable
from isolator.model.message import State
from isolator.store.mail import KeptMessage, Mail, Removed, Side

_log = logging.getLogger(__name__)
_RETRY = 5.0
_SHORTEST_SLEEP = 1.0

# (agent, side, how many): what was kept is gone, because its agent is.
Dropped = Callable[[str, Side, int], Coroutine[Any, Any, object]]


class Mailroom:
    """All mailboxes of the daemon."""

    def __init__(self, mail: Mail, bounds: Bounds, dropped: Dropped) -> None:
        """Call `load` before anything else."""
        self._mail = mail
        self._bounds = bounds
        self._dropped = dropped
        self._mailboxes: dict[Address, Mailbox] = {}
        self._kept_bytes = 0
        self._unwritten: list[tuple[Mailbox, Envelope, Ticket]] = []
        self._is_writing = False
        # Whoever still waits for news of a message holds its ticket; nobody else needs it.
        self._tickets: weakref.WeakValueDictionary[str, Ticket] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    async def load(self) -> None:
        """Find what an earlier daemon kept; what nobody can receive any more is dropped."""
        for queue in await self._mail.drop_orphans():
            await self._dropped(queue.agent, queue.side, queue.count)
        for queue in await self._mail.queues():
            self._count(self._mailbox(Address(queue.agent, queue.side)), queue.count, queue.size)
        if self._mailboxes:
            self._sweep()

    async def close(self) -> None:
        """Part from all receivers, and finish what was begun with the store."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for mailbox in list(self._mailboxes.values()):
            for subscription in list(mailbox.receivers):
                subscription.close()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def deliver(self, address: Address, envelope: Envelope, ticket: Ticket) -> None:
        """Hand a message over, or keep it. Raises TooMany: `mailbox_full`."""
        mailbox = self._mailbox(address)
        subscription = mailbox.receiver
        if subscription is not None and mailbox.direct and subscription.fits(len(envelope.line)):
            subscription.give(envelope.line, ticket)
            return
        self._check_room(mailbox, len(envelope.line))
        self._keep(mailbox, envelope, ticket)

    # keeping

    def _check_room(self, mailbox: Mailbox, size: int) -> None:
        bounds = self._bounds
        if (
            mailbox.count >= bounds.mailbox_messages
            or mailbox.size + size > bounds.mailbox_bytes
            or self._kept_bytes + size > bounds.kept_bytes
        ):
            self._look_after(mailbox)
            raise TooMany(
                "mailbox_full",
                f"{mailbox.count} messages of {mailbox.size} bytes wait for this receiver already, or too much for all"
                " together. Send it again later.",
                waiting=mailbox.count,
                retry_after=1,
            )

    def _keep(self, mailbox: Mailbox, envelope: Envelope, ticket: Ticket) -> None:
        self._count(mailbox, 1, len(envelope.line))
        mailbox.writing += 1
        self._unwritten.append((mailbox, envelope, ticket))
        if not self._is_writing:
            self._is_writing = True
            self._later(self._write())

    async def _write(self) -> None:
        """Write what waits, all of it at a time: a flood is not a flood of commits."""
        try:
            while self._unwritten:
                batch, self._unwritten = self._unwritten, []
                await self._write_batch(batch)
        finally:
            self._is_writing = False

    async def _write_batch(self, batch: list[tuple[Mailbox, Envelope, Ticket]]) -> None:
        for mailbox, _, ticket in batch:
            if mailbox.closed:
                ticket.become("dropped")
        batch = [item for item in batch if not item[0].closed]
        if not batch:
            return
        failure: IsolatorError | None = None
        try:
            await self._mail.add([_kept(mailbox.address, envelope) for mailbox, envelope, _ in batch])
        except IsolatorError as error:
            failure = error
        for mailbox, envelope, ticket in batch:
            mailbox.writing -= 1
            if failure is not None:
                self._count(mailbox, -1, -len(envelope.line))
                ticket.fail(failure)
            elif mailbox.closed:
                ticket.become("dropped")
            else:
                self._tickets[ticket.id] = ticket
                self._expire_by(envelope.expires_at)
                ticket.become("queued")
        for mailbox in {mailbox for mailbox, _, _ in batch}:
            self._look_after(mailbox)

    # receiving

    def subscribe(self, address: Address, hand: Callable[[bytes], None], gone: Callable[[], None]) -> Subscription:
        """Receive what comes for an address, as lines; of several who do, the oldest gets all.

        Raises:
            Unavailable: `daemon_stopping`.
        """
        if self._closing:
            raise Unavailable("daemon_stopping", "The daemon ends; connect again.")
        mailbox = self._mailbox(address)
        subscription = Subscription(mailbox, hand, gone, self._look_after)
        mailbox.receivers.append(subscription)
        self._look_after(mailbox)
        return subscription

    def kept(self, address: Address) -> int:
        """How many messages wait there."""
        mailbox = self._mailboxes.get(address)
        return 0 if mailbox is None else mailbox.count

    def _look_after(self, mailbox: Mailbox) -> None:
        """Something changed: hand out what is kept, if it can be; forget a mailbox that nobody uses."""
        subscription = mailbox.receiver
        if mailbox.closed or mailbox.taking or mailbox.resting:
            return
        if subscription is None:
            self._forget_unused(mailbox)
        elif mailbox.count > mailbox.writing and subscription.fits(1):
            mailbox.taking = True
            self._later(self._take(mailbox))

    def _forget_unused(self, mailbox: Mailbox) -> None:
        if mailbox.unused and self._mailboxes.get(mailbox.address) is mailbox:
            del self._mailboxes[mailbox.address]

    async def _take(self, mailbox: Mailbox) -> None:
        address = mailbox.address
        try:
            while (to := mailbox.receiver) is not None and mailbox.count > mailbox.writing and to.fits(1):
                room = to.room()
                taken, expired = await self._mail.take(address.agent, address.side, time.time(), room)
                self._note_expired(expired)
                self._count(mailbox, -len(taken), -sum(len(message.line) for message in taken))
                back = self._hand_out(mailbox, taken)
                if back:
                    await self._put_back(mailbox, back)
                if not taken and mailbox.receiver is to and to.room() == room:
                    break  # the next one is too large for the room there is
        except IsolatorError as error:
            _log.warning("messages of agent %s can't be handed out yet: %s", address.agent, error)
            mailbox.resting = True
            asyncio.get_running_loop().call_later(_RETRY, self._rested, mailbox)
            return
        finally:
            mailbox.taking = False
        self._forget_unused(mailbox)

    def _rested(self, mailbox: Mailbox) -> None:
        mailbox.resting = False
        self._look_after(mailbox)

    def _hand_out(self, mailbox: Mailbox, taken: list[KeptMessage]) -> list[KeptMessage]:
        """Give them to the receiver; those that nobody can take now, if it left meanwhile."""
        for place, message in enumerate(taken):
            subscription = mailbox.receiver
            if mailbox.closed or subscription is None or not subscription.fits(len(message.line)):
                return taken[place:]
            subscription.give(message.line, self._ticket(message.id) or Ticket(message.id, None))
        return []

    async def _put_back(self, mailbox: Mailbox, messages: list[KeptMessage]) -> None:
        if mailbox.closed:
            self._settle((message.id for message in messages), "dropped")
            return
        self._count(mailbox, len(messages), sum(len(message.line) for message in messages))
        try:
            await self._mail.add(messages)
        except IsolatorError:
            self._count(mailbox, -len(messages), -sum(len(message.line) for message in messages))
            self._settle((message.id for message in messages), "dropped")
            raise

    # ending

    def end(self, address: Address) -> None:
        """Its agent is no more: what waits is dropped, and whoever receives is parted from."""
        mailbox = self._mailboxes.pop(address, None)
        if mailbox is None:
            return
        count = mailbox.count
        self._count(mailbox, -mailbox.count, -mailbox.size)
        mailbox.closed = True
        for subscription in list(mailbox.receivers):
            subscription.close()
            subscription.gone()
        if count:
            self._later(self._drop(address, count))

    async def _drop(self, address: Address, count: int) -> None:
        try:
            self._settle((removed.id for removed in await self._mail.drop(address.agent, address.side)), "dropped")
        finally:
            await self._dropped(address.agent, address.side, count)

    # expiring

    def _expire_by(self, moment: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + max(_SHORTEST_SLEEP, moment - time.time())
        if self._closing or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(due, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        self._later(self._expire())

    async def _expire(self) -> None:
        try:
            expired, following = await self._mail.expire(time.time())
        except IsolatorError as error:
            _log.warning("messages over their time can't be removed yet: %s", error)
            following = time.time() + _RETRY
        else:
            self._note_expired(expired)
        if following is not None:
            self._expire_by(following)

    def _note_expired(self, expired: list[Removed]) -> None:
        for removed in expired:
            mailbox = self._mailboxes.get(Address(removed.agent, removed.side))
            if mailbox is not None:
                self._count(mailbox, -1, -removed.size)
                self._look_after(mailbox)
        self._settle((removed.id for removed in expired), "expired")

    # small things

    def _settle(self, numbers: Iterable[str], state: State) -> None:
        for number in numbers:
            ticket = self._ticket(number)
            if ticket is not None:
                ticket.become(state)

    def _ticket(self, number: str) -> Ticket | None:
        """The ticket of a kept message, if anybody still waits for news of it."""
        ticket = self._tickets.get(number)
        if ticket is not None:
            del self._tickets[number]
        return ticket

    def _mailbox(self, address: Address) -> Mailbox:
        mailbox = self._mailboxes.get(address)
        if mailbox is None:
            mailbox = self._mailboxes[address] = Mailbox(address)
        return mailbox

    def _count(self, mailbox: Mailbox, count: int, size: int) -> None:
        """Count messages in (or out); those of an ended agent are counted out already."""
        if not mailbox.closed:
            mailbox.count += count
            mailbox.size += size
            self._kept_bytes += size

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a mailbox could not be looked after", exc_info=task.exception())


def _kept(address: Address, envelope: Envelope) -> KeptMessage:
    return KeptMessage(address.agent, address.side, envelope.id, envelope.line, envelope.expires_at)
