"""Knocks at the agent's own socket a thousand times without waiting, then says how it went."""

import errno
import json
import socket
import sys
import time

tried = int(sys.argv[1])
outcomes = {}
held = []
for _ in range(tried):
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.setblocking(False)
    try:
        link.connect("/run/isolator/agent.sock")
        link.send(b"\xff" * 65536)
        held.append(link)
        word = "connected"
    except OSError as error:
        word = errno.errorcode.get(error.errno, "?")
        link.close()
        time.sleep(0.001)
    outcomes[word] = outcomes.get(word, 0) + 1
print(json.dumps({"tried": tried, "outcomes": outcomes}), flush=True)
time.sleep(float(sys.argv[2]))
