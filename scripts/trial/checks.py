"""The checks of scripts/try-systemd, run by root inside the booted system, beside PID 1.

Every "can" has its "cannot". Prints one line a check and ends with 1 if any failed. Uses only what a minimal
Debian with systemd, Docker and Python holds.
"""

# ruff: noqa: INP001, T201
from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOCKET = "/run/isolator/isolator.sock"
UNIT = "isolator.service"
DROP_IN = Path("/run/systemd/system/isolator.service.d/trial.conf")
WANTED_CAPABILITIES = {0: "CHOWN", 1: "DAC_OVERRIDE", 6: "SETGID", 7: "SETUID", 19: "SYS_PTRACE", 21: "SYS_ADMIN"}
HOST_NAMESPACE = str(Path("/proc/1/ns/mnt").readlink())
REFUSALS = {"EPERM", "EACCES", "EAFNOSUPPORT"}
failures: list[str] = []


def check(name: str, ok: bool, detail: Any = "") -> None:
    """Print and remember one result."""
    print(f"  {'ok  ' if ok else 'FAIL'} {name}" + (f"  ({detail})" if detail != "" else ""), flush=True)
    if not ok:
        failures.append(name)


def run(*command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A bounded command; never raises for its exit code."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def show(name: str, unit: str = UNIT) -> str:
    """One property of a unit."""
    return run("systemctl", "show", "--value", "--property", name, unit).stdout.strip()


def until(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.1)
    return False


def ask(do: str, timeout: float = 10, **request: Any) -> dict[str, Any]:
    """One request to the stand-in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(timeout)
        caller.connect(SOCKET)
        with caller.makefile("rw") as stream:
            stream.write(json.dumps({"do": do, **request}) + "\n")
            stream.flush()
            answer: dict[str, Any] = json.loads(stream.readline())
    return answer


@contextlib.contextmanager
def drop_in(*lines: str) -> Iterator[None]:
    """The unit with further lines, stopped before and after."""
    run("systemctl", "stop", UNIT)
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text("[Service]\n" + "\n".join(lines) + "\n")
    run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        run("systemctl", "stop", UNIT)
        DROP_IN.unlink()
        run("systemctl", "daemon-reload")
        run("systemctl", "reset-failed", UNIT)


def connect_as(user: str, *groups: str) -> str:
    """`connected`, or the error another user gets at the socket."""
    program = (
        "import socket\ntry:\n"
        f"    socket.socket(socket.AF_UNIX).connect({SOCKET!r})\n    print('connected')\n"
        "except OSError as error:\n    print(type(error).__name__)\n"
    )
    entry = pwd.getpwnam(user)
    asked = ["--groups", ",".join(groups)] if groups else ["--clear-groups"]
    argv = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", *asked]
    return run(*argv, "python3", "-c", program).stdout.strip()


def activation() -> None:
    """The socket is there before the daemon and only for its group."""
    check("the socket listens, the daemon does not run yet", show("ActiveState") == "inactive")
    seen = Path(SOCKET).stat()
    check(
        "socket is 0660 root:isolator",
        (oct(seen.st_mode & 0o777), Path(SOCKET).group()) == ("0o660", "isolator"),
    )
    check("a user outside the group is refused", connect_as("nobody") == "PermissionError")
    check("... and did not start the daemon", show("ActiveState") == "inactive")
    check("a member of the group connects", connect_as("nobody", "isolator") == "connected")
    answer = ask("facts", timeout=30)
    check("the connection started the daemon", show("ActiveState") == "active", show("StatusText"))
    check("it answers on the socket it was passed", answer["pid"] == int(show("MainPID")))
    check("the activation variables are gone", answer["left"] == [], answer["left"])


def readiness() -> None:
    """Start waits for READY=1, and fails without it."""
    with drop_in("Environment=STANDIN_NEVER_READY=1", "TimeoutStartSec=2", "Restart=no"):
        check("a daemon that never says READY=1 does not start", run("systemctl", "start", UNIT).returncode != 0)
    check("one that does, does", run("systemctl", "start", UNIT).returncode == 0)
    with drop_in("Environment=STANDIN_EXIT=125"):
        run("systemctl", "stop", "isolator.socket")
        run("systemctl", "start", UNIT)
        time.sleep(3)
        check(
            "a wrong configuration (exit 125) is not tried again",
            show("NRestarts") == "0",
            show("ActiveState"),
        )
    run("systemctl", "reset-failed", UNIT, "isolator.socket")
    check("the socket comes back", run("systemctl", "start", "isolator.socket").returncode == 0)


def unconfined() -> dict[str, str]:
    """The same tries by root without the unit: a try refused here as well proves nothing there."""
    program = "import json, standin; print(json.dumps(standin.forbidden({})))"
    environment = ("env", "PYTHONPATH=/opt/isolator/trial")
    answers: dict[str, str] = json.loads(run(*environment, "python3", "-c", program).stdout)
    return answers


def privileges() -> None:
    """What is left is enough; the rest is gone."""
    run("systemctl", "start", UNIT)
    status = dict(line.split(":\t", 1) for line in ask("facts")["status"].splitlines() if ":\t" in line)
    wanted = sum(1 << number for number in WANTED_CAPABILITIES)
    for kind in ("CapBnd", "CapEff", "CapPrm"):
        check(f"{kind} is exactly the six", int(status[kind], 16) == wanted, status[kind])
    check("no new privileges, seccomp filter on", (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"))
    control = unconfined()
    answers = ask("forbidden")
    for name, answer in answers.items():
        check(f"cannot: {name}", answer in REFUSALS, f"{answer}; root without the unit: {control[name]}")
    told_apart = sum(control[name] not in REFUSALS for name in answers)
    check("root without the unit is not refused most of these", told_apart * 3 > len(answers) * 2, told_apart)

    other = subprocess.Popen(["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups", "sleep", "60"])
    until(lambda: Path(f"/proc/{other.pid}").stat().st_uid == 10001, 5)
    here = Path("/usr").stat()
    answer = ask("look", pid=other.pid, path="/usr")
    check("can: look into the root of another uid's process", answer.get("inode") == here.st_ino, answer)
    check("cannot: end it", ask("send_signal", pid=other.pid).get("error") == "EPERM")
    other.kill()
    other.wait(5)
    private = Path("/srv/private")
    private.mkdir(mode=0o700, exist_ok=True)
    os.chown(private, 10001, 10001)
    check("can: reach a folder as its owner", ask("reach", uid=10001, path=str(private))["outcome"] == "allowed")
    check("... and not as somebody else", ask("reach", uid=65534, path=str(private))["outcome"] == "EACCES")
    check("... and as root again", ask("reach", uid=0, path=str(private))["outcome"] == "allowed")
    check("can: open a socket to a group", ask("hand_over", group=10001).get("group") == 10001)


def sees_mount(place: str) -> bool:
    """Whether PID 1's mount namespace, which is dockerd's, holds this mount."""
    return any(line.split()[4] == place for line in Path("/proc/1/mountinfo").read_text().splitlines())


def in_container(place: str, *, engine: bool) -> str:
    """What a real container finds in the staged folder."""
    if not engine:
        return "no engine"
    volume = f"type=bind,source={place},target=/w,readonly"
    done = run(
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "--mount",
        volume,
        "trial",
        "/bin/busybox",
        "cat",
        "/w/f",
    )
    return done.stdout.strip() or done.stderr.strip()[-200:]


def start_engine() -> bool:
    """A running engine with a one-file image; False where it cannot run here."""
    if run("systemctl", "start", "docker", timeout=90).returncode != 0 or not shutil.which("busybox"):
        return False
    packed = subprocess.Popen(["tar", "-C", "/usr", "-c", "bin/busybox"], stdout=subprocess.PIPE)
    subprocess.run(
        ["docker", "import", "-", "trial"], stdin=packed.stdout, capture_output=True, check=False, timeout=60
    )
    packed.wait(10)
    done = run("docker", "run", "--rm", "--network", "none", "trial", "/bin/busybox", "true")
    if done.returncode:
        print(f"       containers don't run in this trial: {done.stderr.strip()[-200:]}")
    return done.returncode == 0


def staging(options: list[str]) -> None:
    """Staged mounts reach the engine; with each private-namespace option they do not."""
    engine = start_engine()
    check("an engine runs here", engine)
    source = Path("/srv/workspace")
    source.mkdir(exist_ok=True)
    (source / "f").write_text("the workspace")
    run("systemctl", "start", UNIT)
    check("same mount namespace as PID 1", ask("facts")["mount_namespace"] == HOST_NAMESPACE)
    place = ask("mount", name="plain", source=str(source))["target"]
    check("a staged folder is seen by PID 1", sees_mount(place))
    check("... and by a real container", in_container(place, engine=engine) == "the workspace")
    ask("unmount", name="plain")
    for option in options:
        for extra in ("", "MountFlags=shared"):
            if extra and option.startswith("MountFlags"):
                continue
            with drop_in(option, *filter(None, [extra])):
                name = " with ".join(filter(None, [option, extra]))
                if run("systemctl", "start", UNIT, timeout=60).returncode != 0:
                    check(f"{name}: service starts", False, show("Result"))
                    continue
                private = ask("facts")["mount_namespace"] != HOST_NAMESPACE
                answer = ask("mount", name="probe", source=str(source))
                seen = sees_mount("/run/isolator/mounts/probe")
                hidden = private and not seen
                check(f"{name}: own namespace, mount hidden", hidden, answer.get("error", "mounted inside only"))
                if "target" in answer:
                    ask("unmount", name="probe")
    with drop_in("ProtectSystem=full", "MountFlags=shared"):
        run("systemctl", "start", UNIT)
        ask("mount", name="twin", source=str(source))
        found = in_container("/run/isolator/mounts/twin", engine=engine)
        check("twin: with ProtectSystem a container finds nothing there", found != "the workspace", found[-60:])
    with drop_in("MountFlags=shared"):
        run("systemctl", "start", UNIT)
        check(
            "MountFlags=shared alone makes no namespace",
            ask("facts")["mount_namespace"] == HOST_NAMESPACE,
        )


def lasting() -> None:
    """What survives a restart, a stop, a hang, an engine that stops."""
    source = Path("/srv/workspace")
    run("systemctl", "start", UNIT)
    place = ask("mount", name="kept", source=str(source))["target"]
    child = ask("leave_child")["pid"]
    Path("/run/isolator/marker").write_text("x")
    before = ask("facts")["pid"]
    run("systemctl", "restart", UNIT)
    check("restart makes a new process", ask("facts")["pid"] != before)
    check(
        "restart keeps files, mounts and agents' processes",
        Path("/run/isolator/marker").exists() and sees_mount(place) and Path(f"/proc/{child}").exists(),
    )
    run("systemctl", "stop", "isolator.socket", UNIT)
    check(
        "stop keeps them too",
        Path("/run/isolator/marker").exists() and sees_mount(place) and Path(f"/proc/{child}").exists(),
    )
    check("... and the workspace's own files", (source / "f").read_text() == "the workspace")
    check("stop takes the socket away", not Path(SOCKET).exists())
    run("systemctl", "start", "isolator.socket")
    os.kill(child, 9)

    run("systemctl", "start", UNIT)
    before = ask("facts")["pid"]
    run("systemctl", "stop", "docker.service", "docker.socket", timeout=90)
    check("stopping the engine leaves the daemon running", ask("facts")["pid"] == before, show("SubState"))
    os.kill(before, 9)
    check(
        "kill -9 is answered by a restart",
        until(lambda: show("NRestarts") == "1" and show("ActiveState") == "active", 15),
    )
    check("... without the engine being there", ask("facts")["pid"] != before)
    ask("unmount", name="kept")

    with drop_in("WatchdogSec=2", "TimeoutAbortSec=2"):
        run("systemctl", "start", UNIT)
        time.sleep(5)
        check(
            "a daemon that answers its watchdog lives on",
            show("NRestarts") == "0" and show("ActiveState") == "active",
        )
        with contextlib.suppress(TimeoutError, ValueError, ConnectionError):
            ask("hang", timeout=1)
        check("one that hangs is killed and restarted", until(lambda: show("NRestarts") == "1", 20), "watchdog")
        check("... and serves again", ask("facts", timeout=20)["pid"] == int(show("MainPID")))


def main() -> int:
    """All of it, in an order in which each leaves the next a clean unit."""
    options = [line.strip() for line in Path(sys.argv[1]).read_text().splitlines()]
    for title, act in (
        ("Socket activation", activation),
        ("Readiness", readiness),
        ("Privileges", privileges),
        ("Staged mounts", lambda: staging([line for line in options if "=" in line and line[0] != "#"])),
        ("Restart, stop, hang, engine down", lasting),
    ):
        print(title)
        act()
    print(f"{len(failures)} failed" if failures else "all held")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
