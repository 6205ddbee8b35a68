"""What lines and WebSockets have in common: messages with tags go in, each is answered once, with its tag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isolator.messages.envelope import encode
from isolator.messages.mailbox import Ticket
from isolator.model.errors import BadRequest, IsolatorError

Watch = Callable[[Ticket], None]


class Talk:
    """The answers of one connection. `say(line)` must buffer and return."""

    def __init__(self, say: Callable[[bytes], None]) -> None:
        """Nothing is to be answered yet."""
        self._say = say
        self._unanswered: set[Ticket] = set()

    @property
    def is_answered(self) -> bool:
        """Whether no answer is outstanding."""
        return not self._unanswered

    def send(self, ref: object, submit: Callable[[Watch], Ticket]) -> None:
        """Submit a message; its answer comes when its receiver has it or never will, or when it is kept for it.

        Raises:
            IsolatorError: whatever `submit` raises.
        """

        def watch(ticket: Ticket) -> None:
            if ticket.error is None and ticket.state == "sent":
                return
            ticket.watch = None
            self._unanswered.discard(ticket)
            if ticket.error is not None:
                self.refuse(ticket.error, ref)
            else:
                self._say(encode({"ack": ref, "id": ticket.id, "state": ticket.state}))

        ticket = submit(watch)
        if ticket.watch is not None:
            self._unanswered.add(ticket)

    def refuse(self, error: IsolatorError, ref: object) -> None:
        """Answer with an error."""
        answer: dict[str, Any] = {"error": error.code, "detail": error.detail, "ref": ref}
        if "retry_after" in error.fields:
            answer["retry_after"] = error.fields["retry_after"]
        self._say(encode(answer))

    def close(self) -> None:
        """Nobody is there for the answers that are still to come."""
        for ticket in self._unanswered:
            ticket.watch = None
        self._unanswered.clear()


def unknown_acknowledgement() -> BadRequest:
    """The refusal of an acknowledgement for what was not given, or was acknowledged before."""
    return BadRequest("acknowledgement_unknown", "No message of that id waits here for its acknowledgement.")
