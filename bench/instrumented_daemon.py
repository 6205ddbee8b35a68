"""Runs the daemon with two additions that only the bench wants: step times, and the loop's state on SIGUSR2.

Nothing in the daemon knows of it. Steps are timed by wrapping a fixed list of its functions before it starts: an
entry is (step, seconds since this process started, seconds it took). Waiting counts: a step that awaits the engine
is as long as the engine takes. On SIGUSR2 the number of timers and tasks of the event loop is written.

Usage: instrumented_daemon.py OUTPUT, with the daemon's settings in the environment; OUTPUT gets JSON lines.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (module, class or "", function)
STEPS = (
    ("isolator.agents.spawner", "Spawner", "spawn"),
    ("isolator.agents.launcher", "Launcher", "plan"),
    ("isolator.agents.launcher", "Launcher", "_secrets"),
    ("isolator.agents.launcher", "Launcher", "_build"),
    ("isolator.agents.launcher", "Launcher", "_run"),
    ("isolator.agents.builder", "BoxBuilder", "build"),
    ("isolator.agents.builder", "BoxBuilder", "_await_guest"),
    ("isolator.agents.builder", "BoxBuilder", "discard"),
    ("isolator.agents.builder", "", "check_confinement"),
    ("isolator.agents.builder", "", "check_mounts_inside"),
    ("isolator.agents.channel", "Channel", "listen"),
    ("isolator.agents.channel", "Channel", "release"),
    ("isolator.agents.channel", "Channel", "signal"),
    ("isolator.agents.lifecycle", "Lifecycle", "stop"),
    ("isolator.audit.log", "AuditLog", "intent"),
    ("isolator.audit.log", "AuditLog", "outcome"),
    ("isolator.audit.log", "AuditLog", "_write"),
    ("isolator.store.store", "Store", "add_agent"),
    ("isolator.store.store", "Store", "save_agent"),
    ("isolator.store.store", "Store", "add_event"),
    ("isolator.store.store", "Store", "prune"),
    ("isolator.backends.docker.backend", "DockerBackend", "create"),
    ("isolator.backends.docker.backend", "DockerBackend", "rendered"),
    ("isolator.backends.docker.backend", "DockerBackend", "start"),
    ("isolator.backends.docker.backend", "DockerBackend", "remove"),
    ("isolator.backends.docker.backend", "", "compare"),
    ("docker", "APIClient", "create_container_from_config"),
    ("docker", "APIClient", "inspect_container"),
    ("docker", "APIClient", "start"),
    ("docker", "APIClient", "remove_container"),
)


class Recorder:
    """Writes what was seen, a JSON line each, at once: the daemon may be killed at any time."""

    def __init__(self, output: Path) -> None:
        self._file = output.open("a", buffering=1)

    def wrap(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def note(began: float) -> None:
            self._file.write(json.dumps({"step": step, "at": began, "took": time.perf_counter() - began}) + "\n")

        if asyncio.iscoroutinefunction(function):

            @functools.wraps(function)
            async def waiting(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                try:
                    return await function(*args, **kwargs)
                finally:
                    note(began)

            return waiting

        @functools.wraps(function)
        def direct(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                note(began)

        return direct

    def wrap_steps(self) -> None:
        """Put the timed functions in place."""
        for module_name, class_name, name in STEPS:
            module = importlib.import_module(module_name)
            place = getattr(module, class_name) if class_name else module
            label = f"{class_name}.{name}" if class_name else name
            setattr(place, name, self.wrap(label, getattr(place, name)))

    def write_loop(self, *_: object) -> None:
        """SIGUSR2: the loop's timers that are not cancelled, and its tasks."""
        loop = asyncio.get_running_loop()
        timers = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]  # noqa: SLF001
        self._file.write(json.dumps({"timers": len(timers), "tasks": len(asyncio.all_tasks(loop))}) + "\n")


def main() -> int:
    recorder = Recorder(Path(sys.argv[1]))
    recorder.wrap_steps()
    signal.signal(signal.SIGUSR2, recorder.write_loop)
    settings, daemon = importlib.import_module("isolator.settings"), importlib.import_module("isolator.daemon")
    return int(daemon.run(settings.load_settings()))


if __name__ == "__main__":
    sys.exit(main())
