"""S1: a cold spawn. Our side: POST /v1/agents sent until its 201 is read, on an open connection.

Three raw sides, in turn with ours: the target's (create and start of the same body with `sleep` as its PID 1), the
same with our guest as PID 1, and that one until the guest has knocked at its socket. The last is the floor of any
design whose command starts only after the box was checked from outside: the distance from it is our own cost.
"""

from __future__ import annotations

import os
import socket

from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from rig import Rig

TARGET = 1.10


class Doorbell:
    """The socket at which raw guests knock, in the folder all of them mount."""

    def __init__(self, rig: Rig) -> None:
        rig.raw_body()  # makes the folder
        folder = os.open(rig.home / "raw" / "agents" / "shared", os.O_PATH | os.O_DIRECTORY)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = f"/proc/self/fd/{folder}/agent.sock"
        self._listener.bind(address)
        os.chmod(address, 0o666)
        os.close(folder)
        self._listener.listen(8)
        self._listener.settimeout(30)

    def await_knock(self) -> socket.socket:
        """The next guest's connection, once it has said something."""
        connection, _ = self._listener.accept()
        connection.settimeout(30)
        connection.recv(256)
        return connection

    def close(self) -> None:
        self._listener.close()


def measure(rig: Rig, rounds: int) -> Table:
    ours, raw = Samples("isolator: request to 201"), Samples("raw: create + start, `sleep` as PID 1")
    guest = Samples("raw: create + start, our guest as PID 1")
    knocked = Samples("raw: the same until the guest has knocked")
    for _ in range(rounds):
        agent = str(ours.timed(rig.spawn))
        rig.stop(agent)
        body = rig.raw_body()
        rig.raw_remove(str(raw.timed(lambda body=body: rig.raw_spawn(body))))
        guest_body = rig.raw_body(guest=True)
        doorbell = Doorbell(rig)
        times = Samples("")

        def until_knock(body: dict = guest_body, doorbell: Doorbell = doorbell, times: Samples = times) -> str:
            made = str(times.timed(lambda: rig.raw_spawn(body)))
            doorbell.await_knock().close()
            return made

        rig.raw_remove(str(knocked.timed(until_knock)))
        guest.seconds += times.seconds
        doorbell.close()
        (rig.home / "raw" / "agents" / "shared" / "agent.sock").unlink()
    return Table(
        "S1",
        "cold spawn, hardened, team network",
        SIDE_COLUMNS,
        side_by_side((ours, raw, guest, knocked), raw),
        (verdict("p50 over raw p50", ours.p50 / raw.p50, TARGET),),
        (f"over the raw side whose guest has knocked: {ours.p50 / knocked.p50:.2f}x",),
    )
