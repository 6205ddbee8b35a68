"""Loaded into a daemon's process by PYTHONPATH: faults at chosen points, each on while its file is in $FAULTS."""

import asyncio
import os
import signal
import time
from pathlib import Path

from isolator.agents import channel, launcher, pool
from isolator.agents.builder import BoxBuilder
from isolator.agents.claimer import Claimer
from isolator.agents.launcher import Launcher
from isolator.agents.reconcile import Reconciler
from isolator.backends.docker import backend
from isolator.backends.docker.backend import DockerBackend
from isolator.backends.docker.watch import EngineWatch
from isolator.execs import execution
from isolator.host.placing import Placer
from isolator.model.errors import BoxFailed, Unavailable
from isolator.store.store import Store

FAULTS = Path(os.environ["FAULTS"])


if "SHORT_WAITS" in os.environ:
    execution.START_TIMEOUT, execution.KILL_TIMEOUT = 2.0, 1.0


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
    if on("guest-hostile"):
        guest = folder / "guest.py"
        text, start = guest.read_text(), 'if __name__ == "__main__":'
        assert text.count(start) == 1
        guest.chmod(0o644)
        guest.write_text(text.partition(start)[0] + Path(__file__).with_name("hostile_guest.py").read_text())


backend.create_network = slow_network
# By name in each: what was imported above has the honest one already.
launcher.create_folder = pool.create_folder = lying_guest


# Of a claim


def dying(before, act, after):
    """Die by kill -9 before or after the act."""

    def die(name):
        if name and on(name):
            os.kill(os.getpid(), signal.SIGKILL)

    async def replaced(*arguments, **named):
        die(before)
        result = await act(*arguments, **named)
        die(after)
        return result

    return replaced


def of_a_claim(act, then):
    async def replaced(self, agent, *arguments, **named):
        return await (then if agent.warm else act)(self, agent, *arguments, **named)

    return replaced


place = Placer.place


async def faulty_place(*arguments, **named):
    while on("claim-slow"):  # noqa: ASYNC110 - a file tells nobody
        await asyncio.sleep(0.02)
    if on("place-fails"):
        raise FileNotFoundError(2, "no such place", "/workspace")
    await place(*arguments, **named)


launch = Launcher.launch


async def answer_late(*arguments, **named):
    agent = await launch(*arguments, **named)
    while on("answer-late"):  # noqa: ASYNC110 - a file tells nobody
        await asyncio.sleep(0.02)
    return agent


Launcher.launch = answer_late
Claimer.claim = dying("die-taken", Claimer.claim, None)
Placer.place = dying("die-announced", faulty_place, "die-placed")
BoxBuilder.release = dying(None, BoxBuilder.release, "die-released")
Store.add_agent = of_a_claim(Store.add_agent, dying(None, Store.add_agent, "die-recorded"))
Store.add_agent = refusing("record-refused", Store.add_agent, disk_full)

run_until_done, until_it_fails, ping = Reconciler.run_until_done, EngineWatch._until_it_fails, backend.Engine.ping


async def reconcile_all_the_time(self):
    while True:
        if on("reconciling"):
            await self.run()
        await asyncio.sleep(0.02)


async def run_and_again(self, up):
    result = await run_until_done(self, up)
    self._again = asyncio.create_task(reconcile_all_the_time(self))
    return result


async def fail_when_told(self, watching):
    real = asyncio.create_task(until_it_fails(self, watching))
    while not real.done() and not on("engine-away"):
        await asyncio.wait({real}, timeout=0.05)
    real.cancel()


async def answer_unless_told(self):
    return not on("engine-away") and await ping(self)


Reconciler.run_until_done, EngineWatch._until_it_fails = run_and_again, fail_when_told
backend.Engine.ping = answer_unless_told
