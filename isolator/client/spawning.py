"""The body of a spawn from keyword arguments. Judges nothing: that is for the daemon, which sees who asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from isolator.client.answers import NetworkMode


class Options(TypedDict, total=False):
    """Everything a spawn may say besides team, name and command.

    image: name or digest. env: variables. secrets: names (the host's secret), or mappings with name, value?,
    as? ("file": /run/secrets/NAME, the default, or "env") and env? (the variable; default: NAME in capitals).
    limits: cpus, memory, pids, disk, nofile, wall. workspace: source, mode. mounts: source, target, mode.
    network: "team" or "none". ttl, idle_ttl, cleanup_grace: seconds. create_team: make the team if absent.
    """

    image: str
    env: Mapping[str, str]
    secrets: Sequence[str | Mapping[str, Any]]
    limits: Mapping[str, Any]
    workspace: Mapping[str, str]
    mounts: Sequence[Mapping[str, str]]
    network: NetworkMode
    skills: Sequence[Any]
    capabilities: Sequence[Any]
    session: str
    parent: str
    ttl: float
    idle_ttl: float
    cleanup_grace: float
    create_team: bool


def spawn_body(command: Sequence[str], options: Options) -> dict[str, Any]:
    """The JSON body; members that were not given are left to the daemon's settings.

    Raises:
        TypeError: the command is one text: argv is a list, there is no shell to take it apart.
    """
    if isinstance(command, str):
        raise TypeError("command is a list of arguments, such as ['python3', '-V']; no shell reads it")
    body: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if command:
        body["command"] = list(command)
    return body
