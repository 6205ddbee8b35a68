"""S1: a cold spawn. Our side: POST /v1/agents sent until its 201 is read, on an open connection.

Three raw sides, in turn with ours: the target's (create and start of the same body with `sleep` as its PID 1), the
same with our guest as PID 1, and that one until the guest has knocked at its socket. The last is the floor of any
design whose command starts only after the box was checked from outside: the distance from it is our own cost.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from rig import Rig

TARGET = 1.10


class Doorbell:
    """The socket at which raw guests knock, in the folder all of them mount."""

    def __init__(self, rig: Rig) -> None:
        folder = os.open(rig.raw.guest_folder(), os.O_PATH | os.O_DIRECTORY)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = f"/proc/self/fd/{folder}/agent.sock"
        self._listener.bind(address)
        self._path = rig.raw.guest_folder() / "agent.sock"
        self._path.chmod(0o666)
        os.close(folder)
        self._listener.listen(8)
        self._listener.settimeout(30)

    def await_knock(self) -> None:
        """Until the next guest has said something."""
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(30)
            connection.recv(256)

    def close(self) -> None:
        self._listener.close()
        self._path.unlink()


def until_knock(rig: Rig, guest: Samples, doorbell: Doorbell, body: dict[str, Any]) -> str:
    """Create and start, which `guest` keeps, and wait for the knock; the container's id."""
    made = guest.timed(rig.raw.spawn, body)
    doorbell.await_knock()
    return made


def measure(rig: Rig, rounds: int) -> Table:
    ours, raw = Samples("isolator: request to 201"), Samples("raw: create + start, `sleep` as PID 1")
    guest = Samples("raw: create + start, our guest as PID 1")
    knocked = Samples("raw: the same until the guest has knocked")
    for _ in range(rounds):
        rig.stop(ours.timed(rig.spawn))
        rig.raw.remove(raw.timed(rig.raw.spawn, rig.raw.body()))
        doorbell = Doorbell(rig)
        rig.raw.remove(knocked.timed(until_knock, rig, guest, doorbell, rig.raw.body(guest=True)))
        doorbell.close()
    return Table(
        "S1",
        "cold spawn, hardened, team network",
        SIDE_COLUMNS,
        side_by_side((ours, raw, guest, knocked), raw),
        (verdict("p50 over raw p50", ours.p50 / raw.p50, TARGET),),
        (f"over the raw side whose guest has knocked: {ours.p50 / knocked.p50:.2f}x",),
    )
