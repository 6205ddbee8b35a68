"""The one decision of a spawn: request + caller + team + facts + settings -> BoxSpec, or a typed refusal.

Pure: no file, clock, engine or randomness is touched; the same arguments give the same BoxSpec. Facts that only
the world knows (what a path opened to, which digest an image has) come in as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isolator.model.agent import timestamp
from isolator.model.box import SECRETS_DIR, WORKSPACE, BoxMount, BoxSpec, NetworkMode, Scratch, SecretRef
from isolator.model.errors import BadRequest, Forbidden
from isolator.model.identity import Principal
from isolator.model.image import ImageFacts
from isolator.model.mount import OpenedMount
from isolator.model.names import check_name
from isolator.model.request import EnsureRequest, SecretRequest
from isolator.model.team import Team, network_name
from isolator.policy.environment import check_environment, check_text, check_variable_name
from isolator.policy.limits import decide_limits
from isolator.settings import Settings

SKILL_IMAGE = "isolator/skill"
SECRETS_SIZE = 1024 * 1024
MAX_GRACE = 86_400.0
MAX_TTL = 366 * 86_400.0
MOST_UID = 2**31 - 1
# What the kernel takes as one argument. Records hold the whole command, and every list of agents repeats it.
MAX_COMMAND_BYTES = 131_072
_SECRET_NAME_EXTRA = frozenset("-_.")


@dataclass(frozen=True, slots=True)
class SpawnFacts:
    """What the world says about one spawn. `now` is Unix time; `seccomp` the profile's digest."""

    agent: str
    now: float
    mounts: tuple[OpenedMount, ...]
    image: ImageFacts
    seccomp: str
    host_cpus: int
    daemon: str


def compile_box(
    request: EnsureRequest,
    name: str | None,
    caller: Principal,
    team: Team,
    facts: SpawnFacts,
    settings: Settings,
) -> BoxSpec:
    """The box that answers this request.

    Raises:
        BadRequest, Forbidden, TooLarge: the refusal, with a stable code.
    """
    refuse_unbuilt(request)
    agent_name = check_name(name, "name") if name is not None else facts.agent
    network = _network(request)
    ttl, idle_ttl, cleanup_grace = _times(request, settings)
    limits = decide_limits(request.limits, settings, facts.host_cpus)
    uid, gid = _identity(caller, facts.mounts, settings)
    has_workspace = any(mount.plan.target == WORKSPACE for mount in facts.mounts)
    home = WORKSPACE if has_workspace else "/tmp"
    staging = settings.runtime_dir / "mounts" / facts.agent
    spec = BoxSpec(
        agent=facts.agent,
        name=agent_name,
        team=team.id,
        owner=team.owner,
        instance=settings.instance,
        session=_session(request.session),
        parent=request.parent,
        image=facts.image.reference,
        image_digest=facts.image.digest,
        interpreter=facts.image.interpreter,
        guest_source=str(settings.runtime_dir / "agents" / facts.agent),
        command=check_command(request.command),
        environment=_environment(request, facts, team.id, home),
        working_dir=home,
        uid=uid,
        gid=gid,
        hostname=agent_name,
        limits=limits,
        mounts=tuple(_box_mount(mount, str(staging / str(index))) for index, mount in enumerate(facts.mounts)),
        scratch=(
            Scratch("/tmp", limits.disk, 0o1777),
            Scratch(SECRETS_DIR, SECRETS_SIZE, 0o700),
        ),
        network=network,
        network_name=network_name(team.id) if network == "team" else None,
        seccomp=facts.seccomp,
        secrets=decide_secrets(request.secrets, request.env),
        log_max_bytes=settings.log_max_bytes,
        ttl=ttl,
        idle_ttl=idle_ttl,
        cleanup_grace=cleanup_grace,
        labels=(),
    )
    return _labelled(spec, facts)


def refuse_unbuilt(request: EnsureRequest) -> None:
    """Refuse what this version can't enforce, by name.

    Raises:
        Forbidden: `skills_unavailable`, `capabilities_unavailable`.
    """
    if request.skills:
        raise Forbidden("skills_unavailable", "This version can't verify skills yet, so it runs none.")
    if request.capabilities:
        raise Forbidden("capabilities_unavailable", "This version can't grant capabilities yet, so it grants none.")


def decide_secrets(secrets: Sequence[SecretRequest], environment: dict[str, str]) -> tuple[SecretRef, ...]:
    """The names of a request's secrets and how each is handed over.

    Raises:
        BadRequest: `secret_name_invalid`, `secret_duplicate`, `env_name_invalid`, `secret_value_invalid`.
        Forbidden: `env_name_refused`.
    """
    refs: list[SecretRef] = []
    names: set[str] = set()
    variables = set(environment)
    for secret in secrets:
        name = _secret_name(secret.name)
        if name in names:
            raise BadRequest("secret_duplicate", f"The secret {name} is named twice.", name=name)
        names.add(name)
        variable: str | None = None
        if secret.delivery == "env":
            variable = check_variable_name(secret.env or name.upper().replace("-", "_").replace(".", "_"))
            if variable in variables:
                raise BadRequest("secret_duplicate", f"The variable {variable} is set twice.", name=variable)
            variables.add(variable)
            if secret.value is not None and "\x00" in secret.value:
                raise BadRequest("secret_value_invalid", f"The secret {name} holds a NUL: hand it over as a file.")
        elif secret.env is not None:
            raise BadRequest("secret_name_invalid", f'The secret {name} names a variable but is not "as": "env".')
        if secret.value is not None:
            check_text(secret.value.replace("\x00", ""), "secret_value_invalid", f"The secret {name}")
        refs.append(SecretRef(name, secret.delivery, variable))
    return tuple(refs)


def _secret_name(name: str) -> str:
    allowed = all(letter.isascii() and (letter.isalnum() or letter in _SECRET_NAME_EXTRA) for letter in name)
    if not allowed or name.startswith(".") or len(name) > 64:
        raise BadRequest(
            "secret_name_invalid",
            "A secret's name must be 1 to 64 of letters, digits, '-', '_' and '.', not starting with a dot.",
            name=name[:64].encode("ascii", "backslashreplace").decode(),
        )
    return name


def _network(request: EnsureRequest) -> NetworkMode:
    if request.network is not None:
        return request.network
    # A skill is a stranger's code: it talks to nobody until somebody says so.
    is_skill = bool(request.skills) or (request.image or "").split(":", 1)[0] == SKILL_IMAGE
    return "none" if is_skill else "team"


def _times(request: EnsureRequest, settings: Settings) -> tuple[float | None, float | None, float]:
    ttl = request.ttl if request.ttl is not None else settings.default_ttl
    ceiling = settings.max_ttl if settings.max_ttl is not None else MAX_TTL
    if ttl is None:
        ttl = settings.max_ttl
    for field, value in (("ttl", ttl), ("idle_ttl", request.idle_ttl)):
        if value is not None and not 0 < value <= ceiling:
            raise BadRequest(
                "limit_out_of_range",
                f"{field} must be more than 0 and at most {ceiling:.0f} seconds.",
                field=field,
                maximum=ceiling,
            )
    grace = request.cleanup_grace if request.cleanup_grace is not None else settings.cleanup_grace
    if not 0 <= grace <= MAX_GRACE:
        raise BadRequest(
            "limit_out_of_range",
            f"cleanup_grace must be 0 to {MAX_GRACE:.0f} seconds.",
            field="cleanup_grace",
        )
    return ttl, request.idle_ttl, grace


def _identity(caller: Principal, mounts: Sequence[OpenedMount], settings: Settings) -> tuple[int, int]:
    """The box's uid and gid: the workspace's owner, never 0, and never more than the caller already is.

    A caller other than root gets an agent with their own uid when folders are mounted, even if the folder is
    somebody else's: running as its owner would lend them that owner's rights to every file inside.

    Raises:
        Forbidden: `uid_refused`.
    """
    fallback = (settings.agent_uid, settings.agent_uid)
    if not mounts:
        return fallback
    if caller.uid != 0:
        # Engines have read greater numbers as 0.
        if max(caller.uid, caller.gid) > MOST_UID:
            raise Forbidden("uid_refused", f"uid {caller.uid}, gid {caller.gid}: folders are for ids up to {MOST_UID}.")
        return caller.uid, caller.gid or caller.uid
    first = mounts[0]
    if not 0 < first.uid <= MOST_UID:
        return fallback
    return first.uid, first.gid if 0 < first.gid <= MOST_UID else first.uid


def _session(session: str | None) -> str | None:
    if session is not None and not session.isprintable():
        raise BadRequest("session_invalid", "A session key must be printable text of at most 256 characters.")
    return session


def check_command(command: Sequence[str]) -> tuple[str, ...]:
    """The argv, unchanged.

    Raises:
        BadRequest: `command_invalid`, `command_too_long`.
    """
    for argument in command:
        check_text(argument, "command_invalid", "An argument of the command")
    if command and not command[0]:
        raise BadRequest("command_invalid", "The command's first word, the program, is empty.")
    # The NUL after each argument counts, as it does for the kernel.
    total = sum(len(argument.encode()) + 1 for argument in command)
    if total > MAX_COMMAND_BYTES:
        raise BadRequest(
            "command_too_long",
            f"The command has {total} bytes, its arguments together; {MAX_COMMAND_BYTES} are allowed."
            " Pass data by a file.",
            limit=MAX_COMMAND_BYTES,
        )
    return tuple(command)


def _environment(request: EnsureRequest, facts: SpawnFacts, team: str, home: str) -> tuple[tuple[str, str], ...]:
    given = dict(check_environment(request.env))
    # The engine adds the image's variables whether we like it or not: so they are judged, and part of the spec.
    inherited = dict(check_environment(dict(facts.image.environment)))
    defaults = {
        "HOME": home,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
    }
    own = {
        "ISOLATOR_AGENT": facts.agent,
        "ISOLATOR_TEAM": team,
        "ISOLATOR_AGENT_SOCKET": "/run/isolator/agent.sock",
    }
    return tuple(sorted({**defaults, **inherited, **given, **own}.items()))


def _box_mount(mount: OpenedMount, staged: str) -> BoxMount:
    plan = mount.plan
    return BoxMount(
        source=plan.source,
        target=plan.target,
        read_only=plan.read_only,
        staged=staged,
        device=mount.device,
        inode=mount.inode,
        is_folder=mount.is_folder,
    )


def _labelled(spec: BoxSpec, facts: SpawnFacts) -> BoxSpec:
    deadlines = [limit for limit in (spec.ttl, spec.limits.wall) if limit is not None]
    expires = timestamp(facts.now + min(deadlines)) if deadlines else None
    labels = {
        "openclaw.managed": "true",
        "openclaw.team": spec.team,
        "openclaw.agent": spec.agent,
        "openclaw.name": spec.name,
        "isolator.instance": spec.instance,
        "isolator.daemon": facts.daemon,
        "isolator.owner": spec.owner,
        "isolator.spec": spec.digest(),
        "isolator.image": spec.image_digest,
        "isolator.expires": expires or "never",
    }

    return replace(spec, labels=tuple(sorted(labels.items())))
