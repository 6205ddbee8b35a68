"""The kernel's word about who is at the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection

from isolator.model.identity import Principal

_SO_PEERGROUPS = 59
_MOST_GROUPS = 65536


def principal_of(connection: socket.socket, admin_uids: Collection[int]) -> Principal:
    """Who connected, as of the moment they did. A descriptor that is passed on keeps its opener's identity.

    Raises:
        OSError: no Unix socket.
    """
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack("3I", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Principal(
        uid=uid,
        gid=gid,
        groups=_groups(connection),
        pid=pid,
        is_admin=uid in admin_uids or uid == os.geteuid(),
    )


def _groups(connection: socket.socket) -> tuple[int, ...]:
    room = 256
    while True:
        try:
            data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, room)
        except OSError:
            # Too little room is ERANGE; a kernel without it has none to tell, and then nobody is in any group.
            if room >= _MOST_GROUPS:
                return ()
            room *= 16
            continue
        return struct.unpack(f"{len(data) // 4}I", data)
