"""Looks at and writes to places; prints what it saw and how each try went."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH123, PTH208

import errno
import json
import os
import sys


def outcome(action):
    try:
        return action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


def write(path):
    with open(path, "w") as file:
        file.write("written by the agent")
    return "done"


def read(path):
    with open(path) as file:
        return file.read(200)


task = json.loads(sys.argv[1])
print(
    json.dumps(
        {
            "uid": os.getuid(),
            "list": {path: outcome(lambda path=path: sorted(os.listdir(path))) for path in task.get("list", [])},
            "read": {path: outcome(lambda path=path: read(path)) for path in task.get("read", [])},
            "write": {path: outcome(lambda path=path: write(path)) for path in task.get("write", [])},
            "remount": os.system("mount -o remount,rw /data 2>/dev/null"),
        }
    ),
    flush=True,
)
