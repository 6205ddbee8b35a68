"""Tries to reach what it is told: {"tcp": [[address, port]], "udp": …, "dns": [[server, port, name]]}. Never judges."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH123

import errno
import json
import socket
import struct
import sys
import threading
import time

TIMEOUT = 2.0


def outcome(action):
    try:
        return action()
    except socket.gaierror as error:
        return f"gai {error.errno}"
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


def tcp(address, port):
    with socket.create_connection((address, port), TIMEOUT):
        return "connected"


def udp(address, port):
    """Send, and wait for the echo."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as link:
        link.settimeout(TIMEOUT)
        link.sendto(b"isolator-test", (address, port))
        link.recv(64)
        return "echoed"


def dns(server, port, name):
    """Ask for an A record; how many answers came, or the server's refusal."""
    question = b"".join(bytes((len(part),)) + part.encode() for part in name.split(".")) + b"\0"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.settimeout(TIMEOUT)
        link.sendto(struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + question + b"\0\1\0\1", (server, port))
        reply = link.recv(512)
        return f"rcode {reply[3] & 15} answers {int.from_bytes(reply[6:8], 'big')}"


def opens(family, kind, protocol):
    socket.socket(family, kind, protocol).close()
    return "opened"


def interfaces():
    with open("/proc/net/dev") as file:
        return sorted(line.split(":")[0].strip() for line in file if ":" in line)


def inet6():
    try:
        with open("/proc/net/if_inet6") as file:
            return [line.split()[-1] for line in file]
    except OSError:
        return []


task = json.loads(sys.argv[1])
result = {"tcp": {}, "udp": {}, "dns": {}, "names": {}, "seconds": {}}
jobs = []
for kind, function in (("tcp", tcp), ("udp", udp), ("dns", dns)):
    for target in task.get(kind, []):

        def job(kind=kind, function=function, target=target):
            result[kind][" ".join(str(part) for part in target)] = outcome(lambda: function(*target))

        jobs.append(threading.Thread(target=job))
for start in range(0, len(jobs), 64):
    for thread in jobs[start : start + 64]:
        thread.start()
    for thread in jobs[start : start + 64]:
        thread.join()
for name in task.get("names", []):
    began = time.monotonic()
    result["names"][name] = outcome(lambda name=name: socket.gethostbyname(name))
    result["seconds"][name] = time.monotonic() - began
result["sockets"] = {
    "raw": outcome(lambda: opens(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
    "raw6": outcome(lambda: opens(socket.AF_INET6, socket.SOCK_RAW, 58)),
    "ping": outcome(lambda: opens(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)),
    "packet": outcome(lambda: opens(17, socket.SOCK_RAW, 0x0300)),
    "vsock": outcome(lambda: opens(40, socket.SOCK_STREAM, 0)),
    "tcp": outcome(lambda: opens(socket.AF_INET, socket.SOCK_STREAM, 0)),
}
with open("/proc/net/route") as file:
    result["routes"] = [line.split()[1:3] for line in file][1:]
result["interfaces"] = interfaces()
result["inet6"] = inet6()
with open("/etc/resolv.conf") as file:
    result["resolv"] = [line.strip() for line in file if line.startswith("nameserver")]
print(json.dumps(result), flush=True)
