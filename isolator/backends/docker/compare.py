"""What the engine created, compared field by field with what was asked. Pure.

An old engine ignores options it does not know without a word, and an image can add what nobody asked for
(volumes, environment, labels). So every field that was sent must come back, and every field that could weaken the
box must come back empty.
"""

from __future__ import annotations

from typing import Any

from isolator.model.errors import BoxFailed

_CONFIG_FIELDS = ("Cmd", "Entrypoint", "Hostname", "Image", "StopSignal", "User", "WorkingDir")
_EMPTY_CONFIG = ("AttachStdin", "OpenStdin", "Tty", "Volumes")
_EMPTY_HOST_CONFIG = (
    "AutoRemove", "Binds", "BlkioDeviceReadBps", "CapAdd", "CgroupParent", "ContainerIDFile", "CpuRealtimePeriod",
    "CpuRealtimeRuntime", "DeviceCgroupRules", "DeviceRequests", "Devices", "DnsSearch", "ExtraHosts",
    "GroupAdd", "Links", "OomKillDisable", "PidMode", "PortBindings", "Privileged", "PublishAllPorts", "StorageOpt",
    "Sysctls", "UTSMode", "UsernsMode", "VolumeDriver", "VolumesFrom",
)  # fmt: skip
_RUNTIMES = ("", "runc", "io.containerd.runc.v2")
_OWN_LABELS = ("openclaw.", "isolator.")
# Labels an image of ours carries and a container inherits.
_IMAGE_LABELS = ("isolator.recipe",)


def compare(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse a container that is not what was asked.

    Args:
        wanted: the create call's body, as `render` made it.
        found: the engine's inspect answer.

    Raises:
        BoxFailed: `box_mismatch`, naming the first field that differs.
    """
    config, host_config = found["Config"], found["HostConfig"]
    for name in _CONFIG_FIELDS:
        _equal(f"Config.{name}", wanted.get(name), config.get(name))
    # An image's own interval and timeout are merged in, and mean nothing once the test is NONE.
    tests = [(side.get("Healthcheck") or {}).get("Test") for side in (wanted, config)]
    _equal("Config.Healthcheck", *tests)
    _equal("Config.Env", sorted(wanted["Env"]), sorted(config.get("Env") or []))
    for name in _EMPTY_CONFIG:
        _equal(f"Config.{name}", None, config.get(name))
    _compare_labels(wanted["Labels"], config.get("Labels") or {})
    for name, value in wanted["HostConfig"].items():
        _equal(f"HostConfig.{name}", value, host_config.get(name))
    for name in _EMPTY_HOST_CONFIG:
        _equal(f"HostConfig.{name}", None, host_config.get(name))
    if (host_config.get("Runtime") or "") not in _RUNTIMES:
        _differ("HostConfig.Runtime", "runc", host_config.get("Runtime"))
    places = sorted((mount["Target"], not mount["ReadOnly"]) for mount in wanted["HostConfig"]["Mounts"])
    _equal("Mounts", places, sorted((mount["Destination"], mount["RW"]) for mount in found.get("Mounts") or []))
    endpoints = sorted(((wanted.get("NetworkingConfig") or {}).get("EndpointsConfig") or {"none": None}).keys())
    _equal("NetworkSettings.Networks", endpoints, sorted(found["NetworkSettings"]["Networks"] or {"none": None}))


def _compare_labels(wanted: dict[str, str], found: dict[str, str]) -> None:
    for name, value in wanted.items():
        _equal(f"Config.Labels[{name}]", value, found.get(name))
    for name in found.keys() - wanted.keys():
        if name.startswith(_OWN_LABELS) and name not in _IMAGE_LABELS:
            _differ(f"Config.Labels[{name}]", "absent", found[name])


def _plain(value: Any) -> Any:
    """The value without what is merely written differently: an absent field, an empty text and a zero are the same.

    An empty object under a key is kept: that is how `Volumes` names its places.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in sorted(value.items()) if _plain(item) is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value in ("", 0, False):
        return None
    return value


def _equal(field: str, wanted: Any, found: Any) -> None:
    left, right = _plain(wanted), _plain(found)
    left = None if left in ({}, []) else left
    right = None if right in ({}, []) else right
    if left != right:
        _differ(field, wanted, found)


def _differ(field: str, wanted: Any, found: Any) -> None:
    raise BoxFailed(
        "box_mismatch",
        f"The engine made {field} {str(found)[:200]!r} where {str(wanted)[:200]!r} was asked; the box was removed.",
        field=field,
    )
