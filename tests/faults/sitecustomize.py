"""Loaded into a daemon's process by PYTHONPATH: faults at chosen points, each on while its file is in $FAULTS."""

import os
import time
from pathlib import Path

from isolator.agents import channel
from isolator.backends.docker import backend
from isolator.backends.docker.backend import DockerBackend
from isolator.model.errors import BoxFailed, Unavailable
from isolator.store.store import Store

FAULTS = Path(os.environ["FAULTS"])


def on(name):
    return (FAULTS / name).exists()


def refusing(name, act, error):
    async def replaced(*arguments, **named):
        if on(name):
            raise error()
        return await act(*arguments, **named)

    return replaced


def disk_full():
    return Unavailable("store_unavailable", "The disk is full.")


def busy():
    return BoxFailed("engine_refused", "device or resource busy")


Store.save_agent = refusing("disk-full", Store.save_agent, disk_full)
Store.delete_agent = refusing("disk-full", Store.delete_agent, disk_full)
DockerBackend.remove = refusing("box-stuck", DockerBackend.remove, busy)

create_network, create_folder = backend.create_network, channel.create_folder


def slow_network(*arguments, **named):
    while on("network-slow"):
        time.sleep(0.05)
    return create_network(*arguments, **named)


def lying_guest(folder):
    create_folder(folder)
    if on("guest-lies"):
        guest = folder / "guest.py"
        honest = "self.link.send(frame(STARTED, str(self.child).encode()))"
        text = guest.read_text()
        assert honest in text
        guest.chmod(0o644)
        guest.write_text(text.replace(honest, honest + '; self.link.send(frame(EXITED, b"0", b"0") * 10000)'))


backend.create_network, channel.create_folder = slow_network, lying_guest
