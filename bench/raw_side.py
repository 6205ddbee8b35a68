"""The raw side of every comparison: the Docker SDK, called as plainly and as fast as it can be.

It sends the very body our Docker backend sends for the same spec, rendered before the clock starts, on the same
network, over a connection that is already open, and checks nothing. What our side takes beyond it is what a spawn
through isolator costs. Its boxes carry another instance's name, so that our daemon's reconcile leaves them alone.
"""

from __future__ import annotations

import copy
import os
import secrets
import time
from pathlib import Path
from typing import Any

import docker

from isolator.agents.channel import create_folder
from isolator.backends.docker.render import render
from isolator.model.identity import Principal
from isolator.model.image import ImageFacts
from isolator.model.request import SpawnRequest
from isolator.model.team import Team
from isolator.policy.compile import SpawnFacts, compile_box
from isolator.seccomp import load_profile
from isolator.settings import Settings

SLEEP = ["sleep", "3600"]
TEAM = "bench"
# The bench asks for many small boxes; what is measured does not depend on their caps.
LIMITS = {"memory": "64m", "pids": 32}


def spawn_body(team: str = TEAM, command: list[str] | None = None) -> dict[str, Any]:
    """The request our side sends."""
    return {"team": team, "command": command or SLEEP, "limits": LIMITS}


class RawSide:
    """Raw containers on one engine, labelled with `instance`; `home` holds the folder their guest lies in."""

    def __init__(self, engine: docker.APIClient, home: Path, instance: str) -> None:
        self.engine = engine
        self.home = home
        self.instance = instance
        self.image = ""
        self.made: list[str] = []

    def guest_folder(self) -> Path:
        """The host folder every raw box mounts at /run/isolator, with the guest in it."""
        folder = self.home / "agents" / "shared"
        if not folder.exists():
            folder.parent.mkdir(parents=True)
            create_folder(folder)
        return folder

    def body(self, team: str = TEAM, *, guest: bool = False) -> dict[str, Any]:
        """The create call's body of the spec our side builds for `spawn`, its network included.

        Its entrypoint is `sleep`; with `guest`, our PID 1, which then waits for a daemon that never comes.
        """
        settings = Settings(instance=self.instance, runtime_dir=self.home, state_dir=self.home / "state")
        agent = f"raw{secrets.token_hex(6)}"
        folder = self.guest_folder()
        record = self.engine.inspect_image(self.image)
        variables = tuple(
            (name, value) for name, _, value in (item.partition("=") for item in record["Config"]["Env"] or [])
        )
        profile = load_profile()
        facts = SpawnFacts(
            agent=agent,
            now=time.time(),
            mounts=(),
            image=ImageFacts("isolator/agent-python", self.image, "/usr/bin/python3", variables),
            seccomp=profile.digest,
            host_cpus=os.cpu_count() or 1,
            daemon="bench",
        )
        request = SpawnRequest.model_validate(spawn_body(team))
        caller = Principal(uid=0, gid=0, groups=(0,), pid=os.getpid(), is_admin=True)
        spec = compile_box(request, None, caller, Team(team, "uid:0", "", 0.0), facts, settings)
        version: str = self.engine._version  # noqa: SLF001 - the SDK has no public name for it
        body = copy.deepcopy(render(spec, profile.docker_json(), version))
        body["HostConfig"]["Mounts"][0]["Source"] = str(folder)
        if not guest:
            body["Entrypoint"], body["Cmd"] = ["/bin/sleep", "3600"], []
        return body

    def spawn(self, body: dict[str, Any], client: docker.APIClient | None = None) -> str:
        """Create and start; the container's id."""
        client = client or self.engine
        made = str(client.create_container_from_config(body, f"bench-raw-{secrets.token_hex(8)}")["Id"])
        self.made.append(made)
        client.start(made)
        return made

    def stop(self, container: str) -> None:
        """Kill and remove, as two plain calls."""
        self.engine.kill(container)
        self.engine.remove_container(container, v=True)

    def remove(self, container: str) -> None:
        """Kill and remove in one forced call."""
        self.engine.remove_container(container, v=True, force=True)
