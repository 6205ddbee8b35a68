"""Messages with a real daemon and real containers, and the examples of docs/messages.md as they stand there."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningDaemon, wait_for
from engine_helpers import events_of, knock

pytestmark = pytest.mark.engine
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "messages.md"

# A program of a box: does with its socket what its first argument says, and prints what it hears.
TALK = """
import json, os, socket, sys, time
link = socket.socket(socket.AF_UNIX); link.connect(os.environ["ISOLATOR_AGENT_SOCKET"])
lines = link.makefile("rwb")
def say(thing): lines.write(json.dumps(thing).encode() + b"\\n"); lines.flush()
def hear(): return json.loads(lines.readline())
def show(*things): print(*things, flush=True)
"""


class Gateway:
    """A gateway's WebSocket, as plainly as can be."""

    def __init__(self, daemon: RunningDaemon, agent: str) -> None:
        self.socket = knock(daemon)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /v1/agents/{agent}/messages HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        self._rest = b""
        while b"\r\n\r\n" not in self._rest:
            self._rest += self._receive()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        self.status = int(head.split()[1])

    def _receive(self) -> bytes:
        data = self.socket.recv(1 << 20)
        assert data, f"hung up after {self._rest!r}"
        return data

    def _exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._rest += self._receive()
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload."""
        first, length = self._exactly(2)
        if length == 126:
            length = int.from_bytes(self._exactly(2), "big")
        elif length == 127:
            length = int.from_bytes(self._exactly(8), "big")
        return first & 15, self._exactly(length)

    def hear(self) -> dict[str, Any]:
        """The next object."""
        opcode, data = self.frame()
        assert opcode == 1, (opcode, data)
        result: dict[str, Any] = json.loads(data)
        return result

    def say(self, thing: Any) -> None:
        data = json.dumps(thing).encode()
        length = bytes([0x80 | len(data)]) if len(data) < 126 else bytes([0xFE]) + len(data).to_bytes(2, "big")
        self.socket.sendall(b"\x81" + length + bytes(4) + data)

    def take(self) -> dict[str, Any]:
        """The next message, acknowledged."""
        message = self.hear()
        self.say({"received": message["id"]})
        return message

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def gateway(daemon: RunningDaemon, agent: dict[str, Any]) -> Iterator[Gateway]:
    opened = Gateway(daemon, agent["id"])
    try:
        assert opened.status == 101
        yield opened
    finally:
        opened.close()


def talker(daemon: RunningDaemon, program: str, **body: Any) -> dict[str, Any]:
    return daemon.spawn("python3", "-c", TALK + program, **{"team": "mail", **body})


def send(daemon: RunningDaemon, agent: dict[str, Any], body: Any, query: str = "", **more: Any) -> Any:
    return daemon.post(f"/v1/agents/{agent['id']}/messages{query}", {"type": "note", "body": body, **more})


def printed(daemon: RunningDaemon, agent: dict[str, Any], text: str) -> str:
    """The agent's output, once it holds `text`."""
    return str(
        wait_for(lambda: text in daemon.output(agent) and daemon.output(agent), 20, lambda: daemon.output(agent))
    )


ECHO = """
say({"receive": True})
while True:
    message = hear()
    if "id" not in message or "from" not in message:
        continue
    say({"received": message["id"]})
    say({"to": message["from"], "type": "echo", "body": message["body"]})
"""


def test_gateway_to_agent_and_back(daemon: RunningDaemon) -> None:
    agent = talker(daemon, ECHO)
    with gateway(daemon, agent) as link:
        for number in range(20):
            link.say({"type": "ask", "body": {"n": number, "text": "ü\n\u2028"}, "ref": number})
        answers: list[tuple[int, str]] = []
        echoes: list[dict[str, Any]] = []
        while len(echoes) < 20 or len(answers) < 20:
            thing = link.hear()
            if "ack" in thing:
                answers.append((thing["ack"], thing["state"]))
            else:
                link.say({"received": thing["id"]})
                echoes.append(thing)
        assert [echo["body"]["n"] for echo in echoes] == list(range(20))
        assert {(echo["from"], echo["to"], echo["type"]) for echo in echoes} == {(agent["id"], "gateway", "echo")}
        assert sorted(ref for ref, _ in answers) == list(range(20))
        assert {state for _, state in answers} <= {"delivered", "queued"}
    answer = send(daemon, agent, "late", "?wait=10")
    assert (answer.status, answer.json["state"]) == (200, "delivered")


def test_agent_to_agent_by_name_and_by_id_and_nobody_elses(daemon: RunningDaemon) -> None:
    listener = talker(daemon, ECHO, team="mail-one", name="listener")
    stranger = talker(daemon, ECHO, team="mail-two", name="stranger")
    program = f"""
say({{"receive": True}})
for to in ("listener", "{listener["id"]}", "stranger", "{stranger["id"]}", "nobody"):
    say({{"to": to, "type": "ask", "body": to, "ref": to}})
answers, echoes = {{}}, []
while len(answers) < 5 or len(echoes) < 2:
    thing = hear()
    if "from" in thing:
        say({{"received": thing["id"]}}); echoes.append((thing["from"], thing["body"]))
    else:
        answers[thing.get("ack") or thing["ref"]] = thing.get("state") or thing["error"] + ": " + thing["detail"]
show(json.dumps([answers, echoes]))
"""
    asker = talker(daemon, program, team="mail-one")
    daemon.wait(asker)
    answers, echoes = json.loads(daemon.output(asker))
    assert answers["listener"] == answers[listener["id"]] == "delivered"
    assert answers["stranger"] == answers[stranger["id"]] == answers["nobody"]
    assert answers["nobody"].startswith("receiver_not_found")
    assert echoes == [[listener["id"], "listener"], [listener["id"], listener["id"]]]


def test_queued_until_it_connects_and_dropped_with_it(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("sleep", "60", team="mail")
    for number in range(3):
        answer = send(daemon, agent, number)
        assert (answer.status, answer.json["state"]) == (202, "queued")
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
    dropped = wait_for(lambda: [one for one in events_of(daemon) if one["type"] == "messages.dropped"], 10)
    assert (dropped[-1]["agent"], dropped[-1]["data"]["count"], dropped[-1]["data"]["to"]) == (agent["id"], 3, "agent")
    answer = send(daemon, agent, 4)
    assert (answer.status, answer.json["code"]) == (409, "agent_not_running")


def test_last_words_outlive_their_agent(daemon: RunningDaemon) -> None:
    agent = talker(daemon, 'say({"to": "gateway", "type": "result", "body": 42}); show(hear()["state"])')
    daemon.wait(agent)
    assert daemon.output(agent).strip() == "queued"
    with gateway(daemon, agent) as link:
        assert link.take()["body"] == 42
        daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
        assert link.frame()[0] == 8, "a removed agent's connections end"


def test_a_full_mailbox_a_large_message_and_no_websocket(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("sleep", "60", team="mail")
    statuses = [send(daemon, agent, "x" * 200_000).status for _ in range(22)]
    assert statuses.count(202) == 20
    full = send(daemon, agent, "x" * 200_000)
    assert (full.status, full.json["code"], full.headers["retry-after"]) == (429, "mailbox_full", "1")
    large = send(daemon, agent, "x" * 300_000)
    assert (large.status, large.json["code"]) == (413, "message_too_large")
    plain = daemon.get(f"/v1/agents/{agent['id']}/messages")
    assert (plain.status, plain.json["code"]) == (426, "upgrade_required")


def test_a_stranger_finds_no_agent(daemon: RunningDaemon, as_user: Callable[[int], Any]) -> None:
    agent = daemon.spawn("sleep", "60", team="mail")
    daemon.socket.chmod(0o666)
    with as_user(4242):
        sent, heard = send(daemon, agent, 1), daemon.get(f"/v1/agents/{agent['id']}/messages")
        upgraded = Gateway(daemon, agent["id"])
    assert (sent.status, heard.status, upgraded.status) == (404, 404, 404)
    assert sent.json["code"] == heard.json["code"] == "agent_not_found"
    upgraded.close()


def test_progress_reaches_events(daemon: RunningDaemon) -> None:
    program = """
for number in range(101):
    say({"to": "gateway", "type": "progress", "body": {"text": "step", "fraction": number / 100}})
states = {hear().get("state") for _ in range(101)}
show(states); time.sleep(30)
"""
    agent = talker(daemon, program)
    printed(daemon, agent, "delivered")

    def told() -> list[dict[str, Any]]:
        return [one for one in events_of(daemon) if one["type"] == "agent.progress" and one["agent"] == agent["id"]]

    wait_for(lambda: told() and told()[-1]["data"]["fraction"] == 1, 10, lambda: str(told()))
    assert len(told()) < 20
    assert told()[-1]["data"] == {"name": agent["name"], "text": "step", "fraction": 1.0}


def test_a_killed_daemon_keeps_what_was_queued_and_repeats_nothing(own_daemon: RunningDaemon) -> None:
    agent = talker(own_daemon, 'show("up"); time.sleep(600)', team="mail-kill")
    program = """
while True:
    try:
        link = socket.socket(socket.AF_UNIX); link.connect(os.environ["ISOLATOR_AGENT_SOCKET"])
        lines = link.makefile("rwb"); say({"receive": True})
        while line := lines.readline():
            message = json.loads(line)
            if "from" in message:
                show("GOT", message["body"]); say({"received": message["id"]})
    except OSError:
        pass
    time.sleep(0.05)
"""
    listener = talker(own_daemon, program, name="listener", team="mail-kill")
    answers = [send(own_daemon, listener, number, "?wait=10").json["state"] for number in range(5)]
    assert answers == ["delivered"] * 5
    for number in range(5):
        assert send(own_daemon, agent, number).json["state"] == "queued"
    own_daemon.kill()
    own_daemon.start(proven=False)
    with gateway(own_daemon, listener):
        wait_for(lambda: send(own_daemon, listener, 5, "?wait=10").json["state"] == "delivered", 20)
    got = [line for line in own_daemon.output(listener).splitlines() if line.startswith("GOT")]
    assert got == [f"GOT {number}" for number in range(6)], "once each, across the daemon's death"
    # What was queued is still there, in order, once.
    with gateway(own_daemon, agent) as link:
        link.say({"type": "note", "body": 5})
        assert link.hear()["state"] == "queued"
    record = json.dumps(own_daemon.get(f"/v1/agents/{agent['id']}").json)
    assert '"running"' in record
    database = own_daemon.home / "state" / "isolator.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        kept = [json.loads(row[0])["body"] for row in connection.execute("SELECT line FROM mail ORDER BY number")]
    assert kept == [0, 1, 2, 3, 4, 5]


ATTACK = """
import threading
def connect():
    link = socket.socket(socket.AF_UNIX); link.settimeout(5)
    link.connect(os.environ["ISOLATOR_AGENT_SOCKET"])
    return link
held = []
for _ in range(300):
    try: held.append(connect())
    except OSError: pass
lie = b'{"to":"gateway","type":"a","from":"x"}\\n'
for link, data in zip(held, [b"{" * 100000, b"GET / HTTP/1.1\\r\\n", b"\\xff" * 50000, lie * 3000]):
    try: link.sendall(data)
    except OSError: pass
show("ATTACKING"); time.sleep(60)
"""


def test_a_hostile_box_holds_up_nobody(daemon: RunningDaemon) -> None:
    victim = talker(daemon, ECHO)
    hostile = talker(daemon, ATTACK)
    printed(daemon, hostile, "ATTACKING")
    with gateway(daemon, victim) as link:
        for number in range(5):
            link.say({"type": "ask", "body": number})
            heard = [link.hear(), link.hear()]
            (echo,) = [one for one in heard if "from" in one]
            link.say({"received": echo["id"]})
            assert echo["body"] == number
    assert daemon.get("/healthz").status == 200
    daemon.delete(f"/v1/agents/{hostile['id']}?grace=0")


LINGER = (
    TALK
    + """
import array, struct
server = socket.socket(); server.bind(("127.0.0.1", 0)); server.listen(1)
slow = socket.create_connection(server.getsockname()); peer, _ = server.accept()
slow.setblocking(False)
try:
    while True: slow.send(b"x" * 65536)
except BlockingIOError: pass
slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
try: link.sendmsg([b"{"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [slow.fileno()]))])
except PermissionError: slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
slow.close()
show("SENT")
time.sleep(600)
"""
)


def test_an_open_file_that_is_slow_to_close_holds_up_nobody(daemon: RunningDaemon) -> None:
    hostile = talker(daemon, LINGER)
    # Whose last close waits 20 s for a reader would do so in the daemon's loop, where the kernel threw it away.
    wait_for(lambda: b"SENT" in daemon.get(f"/v1/agents/{hostile['id']}/logs", timeout=8).content, 15)
    assert daemon.get("/healthz", timeout=8).status == 200
    daemon.delete(f"/v1/agents/{hostile['id']}?grace=0")


# the examples of the document, as they stand there


def example(heading: str, language: str) -> str:
    section = DOCUMENT.read_text().split(f"\n## {heading}\n" if heading.startswith("The") else f"\n### {heading}\n", 1)[
        1
    ]
    return section.split(f"```{language}\n", 1)[1].split("```", 1)[0]


@pytest.mark.parametrize(
    ("heading", "language", "program", "image"),
    [
        ("Python", "python", ("python3", "-c"), "isolator/agent-python"),
        ("Node.js", "js", ("node", "-e"), "isolator/agent-node"),
    ],
)
def test_the_documents_agent_answers_the_documents_gateway(
    daemon: RunningDaemon,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    heading: str,
    language: str,
    program: tuple[str, str],
    image: str,
) -> None:
    agent = daemon.spawn(*program, example(heading, language), image=image, team="mail")
    monkeypatch.setenv("ISOLATOR_SOCKET", str(daemon.socket))
    source = example("The gateway's side", "python")
    exec(compile(source, str(DOCUMENT), "exec"), {"agent_id": agent["id"]})
    assert capsys.readouterr().out.splitlines() == ["delivered", "answer {'n': 4}"]


def test_the_documents_curl(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("sh", "-c", example("curl", "sh"), team="mail")
    assert send(daemon, agent, {"n": 2}, "?wait=20").json["state"] == "delivered"
    daemon.wait(agent)
    decoder, text, answers = json.JSONDecoder(), daemon.output(agent), []
    while text.strip():
        answer, end = decoder.raw_decode(text.strip())
        answers.append(answer)
        text = text.strip()[end:]
    assert answers[0] == {"id": agent["id"], "name": agent["name"], "team": "mail"}
    assert answers[1]["state"] == "queued"
    assert [message["body"] for message in answers[2]["items"]] == [{"n": 2}]
    with gateway(daemon, agent) as link:
        assert link.take()["body"] == "from a shell"


def test_the_command_line_sends_and_shows(daemon: RunningDaemon) -> None:
    agent = talker(daemon, ECHO)
    command = [sys.executable, "-m", "isolator"]
    sent = subprocess.run(
        [*command, "send", agent["id"], "ask", "-", "--wait", "20"],
        input='{"n": "\\u001b"}',
        env=daemon.environment(),
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert sent.stdout == "delivered\n"
    with subprocess.Popen([*command, "messages", agent["id"]], env=daemon.environment(), stdout=-1, text=True) as shown:
        assert shown.stdout is not None
        line = shown.stdout.readline()
        daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
        assert shown.wait(20) == 0
    assert line.rstrip().endswith(r'echo  {"n": "\u001b"}')
