"""The agents' own sockets: both tongues, and every attack on them that a hostile box can think of."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from message_helpers import Caller, Person, lobby, until

from isolator.messages.envelope import Address, Bounds
from isolator.messages.mailbox import WINDOW
from isolator.messages.rate import Bucket
from isolator.messages.visitors import MOST_VISITORS

QUICK = replace(Bounds(), patience=0.3)


def note(to: str, body: Any = None, **more: Any) -> dict[str, Any]:
    return {"to": to, "type": "note", "body": body, **more}


# lines


async def test_lines_both_ways(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        sender, receiver = hall.call("aa"), hall.call("bb")
        await receiver.send({"receive": True})
        await sender.send(note("bb", {"x": 1}, ref="r1"))
        message = await receiver.line()
        assert (message["from"], message["to"], message["body"]) == ("aa", "bb", {"x": 1})
        assert await sender.silent(), "no answer before the receiver has it"
        await receiver.send({"received": message["id"]})
        assert await sender.line() == {"ack": "r1", "id": message["id"], "state": "delivered"}
        await sender.send(note("gateway", 2, ref=7))
        answer = await sender.line()
        assert (answer["ack"], answer["state"]) == (7, "queued")
        await receiver.send(note("aa", 3))
        assert (await receiver.line())["ack"] is None


async def test_what_waits_comes_when_it_asks_and_no_more_than_a_window(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        for number in range(WINDOW + 5):
            hall.world.say("aa", "bb", number)
        receiver = hall.call("bb")
        await receiver.send({"receive": True})
        got = [await receiver.line() for _ in range(WINDOW)]
        assert await receiver.silent()
        await receiver.send(*({"received": message["id"]} for message in got))
        got += [await receiver.line() for _ in range(5)]
        assert [message["body"] for message in got] == list(range(WINDOW + 5))


async def test_a_receiver_that_hangs_up_leaves_its_sender_knowing(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        sender, receiver = hall.call("aa"), hall.call("bb")
        await receiver.send({"receive": True})
        await sender.send(note("bb", 1))
        await receiver.line()
        receiver.close()
        assert (await sender.line())["state"] == "unacknowledged"


async def test_who_says_nothing_more_still_gets_the_answers(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        ear = hall.world.ear("bb")
        sender = hall.call("aa")
        await sender.send(note("bb", 1), note("gateway", 2))
        sender.socket.shutdown(1)
        assert (await sender.line())["state"] == "queued"
        await until(lambda: ear.heard)
        ear.acknowledge()
        assert (await sender.line())["state"] == "delivered"
        assert await sender.to_end() == b""
        await until(lambda: not hall.visitors._visitors)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json"),
        (b"{}}", "invalid_json"),
        (b'{"to":"gateway","type":"a","body":NaN}', "invalid_json"),
        (b'{"to":"gateway","type":"a","body":1e999}', "invalid_json"),
        (b'{"to":"gateway","to":"bb","type":"a"}', "invalid_json"),
        (b'{"to":"gateway","type":"a","body":"\\ud800"}', "invalid_json"),
        (b'{"to":"gateway","type":"a","body":"\xff"}', "invalid_json"),
        (b'{"to":"gateway","type":"a","body":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"to":"gateway","type":"a","body":' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"to":"gateway","type":"a","from":"bb"}', "unknown_field"),
        (b'{"to":"gateway","type":"a","owner":"root"}', "unknown_field"),
        (b'{"to":"gateway"}', "invalid_request"),
        (b'{"to":"gateway","type":"a b"}', "invalid_request"),
        (b'{"to":"gateway","type":"a\\n"}', "invalid_request"),
        (b'{"to":"gateway","type":1}', "invalid_request"),
        (b'{"to":["bb"],"type":"a"}', "invalid_request"),
        (b'{"to":"gateway","type":"a","ttl":0}', "invalid_request"),
        (b'{"to":"gateway","type":"a","ttl":1e9}', "invalid_request"),
        (b'{"to":"gateway","type":"a","ref":"' + b"x" * 200 + b'"}', "invalid_request"),
        (b'{"receive":1}', "invalid_request"),
        (b'{"received":["x"]}', "acknowledgement_unknown"),
        (b'{"received":"0123456789abcdef"}', "acknowledgement_unknown"),
        (b'{"to":"zz","type":"a"}', "receiver_not_found"),
        (b'{"to":"cc","type":"a"}', "receiver_not_found"),
        (b'{"to":"gateway","type":"a","body":"' + b"x" * 262_200 + b'"}', "message_too_large"),
    ],
)
async def test_a_line_that_is_none_is_answered_and_the_next_is_heard(tmp_path: Path, line: bytes, code: str) -> None:
    async with lobby(tmp_path, "aa", Person("cc", team="other")) as hall:
        sender = hall.call("aa")
        await sender.send_bytes(b'{"to":"gateway","type":"first"}\n' + line + b"\n")
        answers = [await sender.line(), await sender.line()]
        assert {answer.get("error") for answer in answers} == {None, code}
        await sender.send(note("gateway", 1, ref="after"))
        assert (await sender.line())["ack"] == "after"


async def test_the_sender_is_who_the_socket_says(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        ear = hall.world.ear("aa", "gateway")
        sender = hall.call("aa")
        await sender.send({**note("gateway", 1), "from": "bb"}, note("gateway", {"from": "bb"}))
        assert (await sender.line())["error"] == "unknown_field"
        await until(lambda: ear.heard)
        assert [message["from"] for message in ear.heard] == ["aa"]
        status, _, _ = await hall.http("aa", "POST", "/v1/messages", {**note("gateway"), "from": "bb"})
        assert status == 400
        assert await hall.http("aa", "GET", "/v1/me") == (
            200,
            (await hall.http("aa", "GET", "/v1/me"))[1],
            {"id": "aa", "name": "name-of-aa", "team": "crew"},
        )


async def test_a_flood_is_told_slowed_down_and_holds_up_nobody(tmp_path: Path) -> None:
    bounds = replace(Bounds(), rate=50.0)
    async with lobby(tmp_path, "aa", "bb", "cc", bounds=bounds) as hall:
        ear = hall.world.ear("aa", "gateway")

        async def acknowledge() -> None:
            while True:
                for place in range(len(ear.heard)):
                    ear.acknowledge(place)
                await asyncio.sleep(0.005)

        reading = asyncio.create_task(acknowledge())
        flooder = hall.call("aa")
        flood = asyncio.create_task(
            flooder.send_bytes(b"".join(json.dumps(note("gateway", n, ref=n)).encode() + b"\n" for n in range(5000)))
        )
        refused = None
        for _ in range(400):
            answer = await flooder.line()
            if "error" in answer:
                refused = answer
                break
        assert refused is not None
        assert refused["error"] == "rate_limited"
        assert refused["ref"] not in [message["body"] for message in ear.heard]
        assert refused["retry_after"] > 0
        assert len(ear.heard) <= 150, "two seconds' worth, and not much more"
        # Meanwhile another agent is served at once.
        sender, receiver = hall.call("bb"), hall.call("cc")
        await receiver.send({"receive": True})
        await sender.send(note("cc", 1))
        message = await receiver.line(1.0)
        await receiver.send({"received": message["id"]})
        assert (await sender.line(1.0))["state"] == "delivered"
        # The agent's other connections share its pace.
        status, headers, problem = await hall.http("aa", "POST", "/v1/messages", note("gateway"))
        assert (status, problem["code"]) == (429, "rate_limited")
        assert float(headers["retry-after"]) > 0
        flood.cancel()
        reading.cancel()


async def test_nonsense_has_its_price_as_well(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", bounds=replace(Bounds(), rate=10.0)) as hall:
        flooder = hall.call("aa")
        flood = asyncio.create_task(flooder.send_bytes(b"{\n" * 50_000))
        await asyncio.sleep(0.3)
        count = 0
        while not await flooder.silent(0.02):
            await flooder.line()
            count += 1
        assert count < 60
        flood.cancel()


async def test_one_visitor_too_many_is_closed_at_once(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        callers = [hall.call("aa") for _ in range(MOST_VISITORS)]
        assert await hall.call("aa").to_end() == b""
        await hall.call("bb").send(note("gateway"))
        for caller in callers[1:]:
            caller.close()
        await until(lambda: len(hall.visitors._visitors["aa"]) == 1)
        other = hall.call("aa")
        await other.send(note("gateway"))
        assert (await other.line())["state"] == "queued"


async def test_ten_thousand_connections(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(10_000):
            hall.call("aa").close()
        hall.callers.clear()
        sender = hall.call("bb")
        await sender.send(note("gateway"))
        assert (await sender.line())["state"] == "queued"
        await until(lambda: set(hall.visitors._visitors) == {"bb"})
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 4  # noqa: PTH208


@pytest.mark.parametrize(
    "half",
    [
        b'{"to":"gateway","type":"a"',
        b"",
        b"GET /v1/me HTTP/1.1\r\nHos",
        b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n{",
    ],
)
async def test_half_a_request_and_silence_is_cut_off(tmp_path: Path, half: bytes) -> None:
    async with lobby(tmp_path, "aa", bounds=QUICK) as hall:
        caller = hall.call("aa")
        await caller.send_bytes(half)
        said = await caller.to_end(5)
        if half[:1] in (b"{", b"P"):
            assert b"request_timeout" in said
        await until(lambda: not hall.visitors._visitors)


async def test_a_quiet_conversation_is_left_alone(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", bounds=QUICK) as hall:
        caller = hall.call("aa")
        await caller.send({"receive": True})
        await asyncio.sleep(0.8)
        hall.world.say("gateway", "aa", 1)
        assert (await caller.line())["body"] == 1


@pytest.mark.parametrize("end", [b"", b'"}\n'])
async def test_a_line_of_five_megabytes(tmp_path: Path, end: bytes) -> None:
    async with lobby(tmp_path, "aa") as hall:
        caller = hall.call("aa")
        sending = asyncio.create_task(caller.send_bytes(b'{"to":"' + b"x" * 5_000_000 + end))
        said = await caller.to_end()
        assert json.loads(said.splitlines()[0])["error"] == "message_too_large"
        await asyncio.gather(sending, return_exceptions=True)
        await until(lambda: not hall.visitors._visitors)


async def test_a_reader_that_never_reads_costs_a_bounded_buffer(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb", "cc", bounds=replace(Bounds(), rate=1e5)) as hall:
        deaf = hall.call("aa")
        await deaf.send({"receive": True})
        await asyncio.sleep(0.05)
        for _ in range(60):
            hall.world.say("bb", "aa", "x" * 60_000)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await deaf.send_bytes(b"{\n" * 10_000_000)
        (visitor,) = hall.visitors._visitors["aa"]
        assert visitor._transport is not None
        assert visitor._transport.get_write_buffer_size() < 1024 * 1024
        assert len(visitor._inner._buffer) < 1024 * 1024  # type: ignore[union-attr]
        sender = hall.call("bb")
        await sender.send(note("gateway"))
        assert (await sender.line())["state"] == "queued"
        # Whoever begins to read goes on where it stopped.
        assert await deaf.line()
        hall.visitors.close_agent("aa")
        await until(lambda: "aa" not in hall.visitors._visitors)


async def test_the_end_of_an_agent_hangs_up_on_its_visitors(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        callers = [hall.call("aa") for _ in range(3)]
        await callers[0].send({"receive": True})
        await callers[1].send_bytes(b"GET /v1/messages?wait=50 HTTP/1.1\r\nHost: x\r\n\r\n")
        other = hall.call("bb")
        await asyncio.sleep(0.1)
        unborn = hall.call("aa")
        hall.visitors.close_agent("aa")
        for caller in (*callers, unborn):
            assert await caller.to_end() == b""
        await until(lambda: set(hall.visitors._visitors) == {"bb"})
        assert hall.visitors._buckets.keys() == {"bb"}
        await other.send(note("gateway"))
        await other.line()
        assert await hall.world.store.mail.queues()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    b"{",
                    b"}\n",
                    b"\n",
                    b'{"receive":true}\n',
                    b'{"received":"x"}\n',
                    b"GET / HTTP/1.1\r\n\r\n",
                    b"\x00" * 300,
                ]
            ),
            st.builds(
                lambda name, value: json.dumps({name: value, "type": "a"}).encode() + b"\n",
                st.sampled_from(["to", "from", "ref", "receive", "received"]),
                st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=3)),
            ),
        ),
        max_size=12,
    )
)
async def test_whatever_is_said_the_others_are_served(tmp_path_factory: Any, data: list[bytes]) -> None:
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with lobby(tmp_path_factory.mktemp("fuzz"), "aa", "bb") as hall:
        await _say(hall.call("aa"), data)
        sender = hall.call("bb")
        await sender.send(note("gateway", 1))
        assert (await sender.line())["state"] == "queued"
    assert failures == []


async def _say(caller: Caller, data: list[bytes]) -> None:
    try:
        for piece in data:
            await caller.send_bytes(piece)
            await asyncio.sleep(0)
    except ConnectionError:
        pass  # it was hung up on
    caller.close()


# HTTP


async def test_http_sends_waits_and_receives(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        status, _, answer = await hall.http("aa", "POST", "/v1/messages", note("bb", 1))
        assert (status, answer["state"]) == (202, "queued")
        status, _, batch = await hall.http("bb", "GET", "/v1/messages")
        assert status == 200
        assert [message["body"] for message in batch["items"]] == [1]
        assert (await hall.http("bb", "GET", "/v1/messages"))[2]["items"] == []
        waiting = asyncio.create_task(hall.http("bb", "GET", "/v1/messages?wait=20"))
        await until(lambda: Address("bb", "agent") in hall.world.router.mailroom._mailboxes)
        status, _, answer = await hall.http("aa", "POST", "/v1/messages?wait=20", note("name-of-bb", 2, ref="x"))
        assert (status, answer["state"]) == (200, "delivered")
        assert [message["body"] for message in (await waiting)[2]["items"]] == [2]


async def test_http_waits_for_a_queued_message_to_arrive(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        sending = asyncio.create_task(hall.http("aa", "POST", "/v1/messages?wait=20", note("bb", 1)))
        await until(lambda: hall.world.router.kept(Address("bb", "agent")) == 1)
        assert len((await hall.http("bb", "GET", "/v1/messages"))[2]["items"]) == 1
        status, _, answer = await sending
        assert (status, answer["state"]) == (200, "delivered")


async def test_a_long_poll_that_hangs_up_takes_nothing_with_it(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb") as hall:
        caller = hall.call("bb")
        await caller.send_bytes(b"GET /v1/messages?wait=50 HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: Address("bb", "agent") in hall.world.router.mailroom._mailboxes)
        caller.close()
        await until(lambda: Address("bb", "agent") not in hall.world.router.mailroom._mailboxes)
        _, states = hall.world.say("aa", "bb", 1)
        await until(lambda: states == ["queued"])


async def test_a_batch_that_is_not_read_is_not_received(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", "bb", bounds=replace(Bounds(), patience=0.5)) as hall:
        states = [hall.world.say("aa", "bb", "x" * 200_000)[1] for _ in range(2)]
        await until(lambda: all(one == ["queued"] for one in states))
        caller = hall.call("bb")
        ticket, _ = hall.world.say("aa", "bb", "last")
        await caller.send_bytes(b"GET /v1/messages HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: not hall.visitors._visitors, 5)
        assert ticket.state in ("queued", "unacknowledged", None)
        assert all("delivered" not in one for one in states)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/messages", b"[1]", 400, "invalid_request"),
        ("POST", "/v1/messages", b"{", 400, "invalid_json"),
        ("POST", "/v1/messages?from=bb", note("gateway"), 400, "invalid_query"),
        ("POST", "/v1/messages?wait=61", note("gateway"), 400, "invalid_query"),
        ("POST", "/v1/messages", note("zz"), 404, "receiver_not_found"),
        ("POST", "/v1/messages", note("gateway", "x" * 300_000), 413, "message_too_large"),
        ("GET", "/v1/agents", None, 404, "route_not_found"),
        ("DELETE", "/v1/messages", None, 405, "method_not_allowed"),
    ],
)
async def test_http_refusals(tmp_path: Path, method: str, path: str, body: Any, status: int, code: str) -> None:
    async with lobby(tmp_path, "aa") as hall:
        got, headers, problem = await hall.http("aa", method, path, body)
        assert (got, problem["code"]) == (status, code)
        assert headers["content-type"].startswith("application/problem+json")


async def test_a_body_in_chunks_has_its_price_as_well(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", bounds=replace(Bounds(), rate=10.0)) as hall:
        body = json.dumps(note("aa", "x" * 200_000)).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        callers = [hall.call("aa") for _ in range(3)]
        for caller in callers:
            await caller.send_bytes(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        answers = [await caller.to_end() for caller in callers]
        assert sum(b" 429 " in answer for answer in answers) == 2, "a burst is twenty, and one of these counts as 17"


async def test_a_full_mailbox_is_told_in_both_tongues(tmp_path: Path) -> None:
    async with lobby(tmp_path, "aa", bounds=replace(Bounds(), mailbox_messages=1)) as hall:
        caller = hall.call("aa")
        await caller.send(note("gateway"), note("gateway", ref="second"))
        answers = {(await caller.line()).get("error"), (await caller.line()).get("error")}
        assert answers == {None, "mailbox_full"}
        status, headers, problem = await hall.http("aa", "POST", "/v1/messages", note("gateway"))
        assert (status, problem["code"], headers["retry-after"]) == (429, "mailbox_full", "1")


def test_a_bucket_holds_two_seconds_and_counts_large_messages_as_more() -> None:
    bucket = Bucket(100.0)
    taken = 0
    while not bucket.take(10):
        taken += 1
    assert 200 <= taken < 260
    assert Bucket(100.0).take(10 * 1024**2) == 0, "even the largest fits a full one"
    large = Bucket(100.0)
    assert sum(not large.take(256 * 1024) for _ in range(100)) < 20
