"""BoxSpec -> the body of the engine's create call. Pure; what `compare` later expects is made here too.

Each "obvious" option that Docker 20.10 ignores silently is avoided or checked after create: see docs/limits.md.
"""

from __future__ import annotations

from typing import Any

from docker.types import (
    ContainerConfig,
    EndpointConfig,
    HostConfig,
    LogConfig,
    Mount,
    NetworkingConfig,
    Ulimit,
)

from isolator.model.box import GUEST_DIR, BoxSpec

# What the engine masks by default differs by version; this is the union, and it is sent, not hoped for.
MASKED_PATHS = [
    "/proc/acpi", "/proc/asound", "/proc/bus/pci", "/proc/cmdline", "/proc/interrupts", "/proc/kcore",
    "/proc/key-users", "/proc/keys", "/proc/kpagecount", "/proc/kpageflags", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/proc/vmallocinfo",
    "/proc/zoneinfo", "/sys/class", "/sys/devices/virtual", "/sys/firmware", "/sys/fs/bpf", "/sys/fs/cgroup",
    "/sys/kernel", "/sys/module",
]  # fmt: skip
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

# No resolver: the engine's own DNS answers for names of the team and has nowhere to forward the rest.
NO_RESOLVER = ["127.0.0.1"]
# The engine leaves a question it can't forward unanswered: ask shortly, or each unknown name costs ten seconds.
IMPATIENT = ["timeout:1", "attempts:2"]
_INODES_PER_SCRATCH = 65536
_NANO = 1_000_000_000
_OOM_SCORE = 500


def render(spec: BoxSpec, seccomp_json: str, api_version: str) -> dict[str, Any]:
    """The create call's body.

    Args:
        spec: the box.
        seccomp_json: the profile's text whose digest the spec holds.
        api_version: the engine's API version, such as "1.41".
    """
    body: dict[str, Any] = dict(
        ContainerConfig(
            version=api_version,
            image=spec.image_digest,
            command=list(spec.command),
            entrypoint=[spec.interpreter, "-I", "-S", f"{GUEST_DIR}/guest.py"],
            hostname=spec.hostname,
            user=f"{spec.uid}:{spec.gid}",
            working_dir=spec.working_dir,
            environment=[f"{name}={value}" for name, value in spec.environment],
            labels=dict(spec.labels),
            healthcheck={"test": ["NONE"]},
            stop_signal="SIGTERM",
            host_config=_host_config(spec, seccomp_json, api_version),
            networking_config=_networking(spec, api_version),
        )
    )
    body["AttachStdout"] = body["AttachStderr"] = False
    return body


def _host_config(spec: BoxSpec, seccomp_json: str, api_version: str) -> dict[str, Any]:
    limits = spec.limits
    config: dict[str, Any] = dict(
        HostConfig(
            version=api_version,
            network_mode=spec.network_name or "none",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true", f"seccomp={seccomp_json}"],
            read_only=True,
            init=False,
            ipc_mode="private",
            cgroupns="private",
            dns=NO_RESOLVER,
            dns_opt=IMPATIENT,
            restart_policy={"Name": "no", "MaximumRetryCount": 0},
            nano_cpus=int(limits.cpus * _NANO),
            mem_limit=limits.memory,
            memswap_limit=limits.memory,
            pids_limit=limits.pids,
            shm_size=limits.disk,
            oom_score_adj=_OOM_SCORE,
            ulimits=[
                Ulimit(name="core", soft=0, hard=0),
                Ulimit(name="nofile", soft=limits.nofile, hard=limits.nofile),
            ],
            log_config=LogConfig(
                # It keeps bytes as they were written; "json-file" would replace what is not UTF-8.
                type="local",
                config={
                    "max-size": str(max(4096, spec.log_max_bytes // 2)),
                    "max-file": "2",
                    "compress": "false",
                },
            ),
            tmpfs={
                scratch.target: (
                    f"rw,noexec,nosuid,nodev,size={scratch.size},mode={scratch.mode:o},"
                    f"uid={spec.uid},gid={spec.gid},nr_inodes={_INODES_PER_SCRATCH}"
                )
                for scratch in spec.scratch
            },
            mounts=[
                _bind(spec.guest_source, GUEST_DIR, read_only=True),
                *(_bind(mount.staged, mount.target, read_only=mount.read_only) for mount in spec.mounts),
            ],
        )
    )
    config["MaskedPaths"] = MASKED_PATHS
    config["ReadonlyPaths"] = READONLY_PATHS
    return config


def _bind(source: str, target: str, *, read_only: bool) -> Mount:
    mount = Mount(target=target, source=source, type="bind", read_only=read_only, propagation="rprivate")
    # A read-only bind is not recursive on this engine: what is mounted below it would stay writable. So nothing is.
    mount["BindOptions"]["NonRecursive"] = True
    return mount


def _networking(spec: BoxSpec, api_version: str) -> dict[str, Any] | None:
    if spec.network_name is None:
        return None
    endpoint = EndpointConfig(version=api_version, aliases=[spec.name])
    result: dict[str, Any] = dict(NetworkingConfig({spec.network_name: endpoint}))
    return result
