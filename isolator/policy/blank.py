"""Which box, made before its agent is known, can become an agent's: the profile, and the blank's own spec. Pure.

What the engine fixes when it makes a container is the profile: two specs with equal profiles differ only in what is
handed over later (command, environment, working folder, secrets, the workspace, times). So a blank is exactly as
confined as the agent's own box would have been.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from isolator.model.box import WORKSPACE, BoxMount, BoxSpec, plain
from isolator.model.limits import Limits
from isolator.model.request import EnsureRequest, LimitsRequest

# Their images have the place where a workspace appears; a read-only root can't be given one later.
_OWN_IMAGES = "isolator/"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a box has for its whole life. Never shared by two teams."""

    team: str
    owner: str
    instance: str
    image: str
    image_digest: str
    interpreter: str
    uid: int
    gid: int
    limits: Limits
    network: str
    seccomp: str
    log_max_bytes: int

    @property
    def key(self) -> str:
        """A short name of it, the same wherever and whenever it is computed."""
        text = json.dumps(self, default=plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def profile_of(spec: BoxSpec) -> Profile | None:
    """The profile whose blanks can serve this spec; None if its box must be made for it.

    An agent's own name is a host name and a name in the team's network, which no engine changes later; a place for
    a mount other than the workspace can't be made in a read-only root.
    """
    if spec.name != spec.agent or not spec.image.startswith(_OWN_IMAGES):
        return None
    if any(mount.target != WORKSPACE for mount in spec.mounts):
        return None
    return Profile(
        team=spec.team,
        owner=spec.owner,
        instance=spec.instance,
        image=spec.image,
        image_digest=spec.image_digest,
        interpreter=spec.interpreter,
        uid=spec.uid,
        gid=spec.gid,
        limits=replace(spec.limits, wall=None),
        network=spec.network,
        seccomp=spec.seccomp,
        log_max_bytes=spec.log_max_bytes,
    )


def bare_request(profile: Profile) -> EnsureRequest:
    """What asks for a box of this profile and nothing of any agent's."""
    limits = profile.limits
    return EnsureRequest(
        image=profile.image,
        network="team" if profile.network == "team" else "none",
        limits=LimitsRequest(
            cpus=limits.cpus, memory=limits.memory, pids=limits.pids, disk=limits.disk, nofile=limits.nofile
        ),
    )


def blank_of(bare: BoxSpec, profile: Profile) -> BoxSpec:
    """The blank, from what `bare_request` was compiled to under the blank's own id.

    Raises:
        ValueError: the two do not agree: settings changed meanwhile.
    """
    blank = replace(bare, pool=profile.key, uid=profile.uid, gid=profile.gid, ttl=None, cleanup_grace=0.0)
    if profile_of(blank) != profile:
        raise ValueError("the blank's profile is another")
    labels = {**dict(blank.labels), "isolator.pool": profile.key, "isolator.expires": "never"}
    labels["isolator.spec"] = blank.digest()
    return replace(blank, labels=tuple(sorted(labels.items())))


def under(agent: str, spec: BoxSpec) -> BoxSpec:
    """The spec as it would have been compiled under another id. Only for one without a name of its own."""
    ids = {"openclaw.agent": agent, "openclaw.name": agent}
    return replace(
        spec,
        agent=agent,
        name=agent,
        hostname=agent,
        guest_source=_renamed(spec.guest_source, agent),
        environment=tuple((name, agent if name == "ISOLATOR_AGENT" else value) for name, value in spec.environment),
        mounts=tuple(_moved(mount, agent) for mount in spec.mounts),
        labels=tuple((name, ids.get(name, value)) for name, value in spec.labels),
    )


def _renamed(path: str, name: str) -> str:
    return f"{path.rpartition('/')[0]}/{name}"


def _moved(mount: BoxMount, agent: str) -> BoxMount:
    folder, _, number = mount.staged.rpartition("/")
    return replace(mount, staged=f"{_renamed(folder, agent)}/{number}")
