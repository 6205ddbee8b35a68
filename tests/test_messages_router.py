"""The router: order, bounds, time to live, a store that outlives it, and at most once whatever comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_helpers import Person, World, until, world

from isolator.messages.envelope import Address, Bounds
from isolator.messages.mailbox import WINDOW, Subscription
from isolator.model.errors import BadRequest, Conflict, IsolatorError, NotFound, TooLarge, TooMany, Unavailable
from isolator.store.mail import KeptMessage


async def test_a_receiver_that_is_there_gets_it_and_only_its_word_makes_it_delivered(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        ear = post.ear("bb")
        ticket, states = post.say("aa", "bb", {"x": [1, "ü"]})
        assert states == ["sent"]
        assert ear.heard == [
            {
                "id": ticket.id,
                "from": "aa",
                "to": "bb",
                "type": "note",
                "body": {"x": [1, "ü"]},
                "sent_at": ear.heard[0]["sent_at"],
                "seq": ear.heard[0]["seq"],
            }
        ]
        assert ear.acknowledge()
        assert states == ["sent", "delivered"]
        assert not ear.acknowledge(), "a second time says nothing new"
        assert await post.store.mail.queues() == [], "no disk for what was handed over"


async def test_a_receiver_that_leaves_without_a_word_gets_it_no_second_time(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        ear = post.ear("bb")
        _, states = post.say("aa", "bb", 1)
        ear.close()
        assert states == ["sent", "unacknowledged"]
        again = post.ear("bb")
        await asyncio.sleep(0.05)
        assert again.heard == []


async def test_what_cannot_be_handed_over_is_on_disk_before_it_is_called_queued(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        ticket, states = post.say("aa", "bb", "later")
        assert states == []
        await until(lambda: states)
        assert states == ["queued"]
        async with world(tmp_path, "aa", "bb") as other:  # what another daemon would find now
            assert [(queue.agent, queue.side, queue.count) for queue in await other.store.mail.queues()] == [
                ("bb", "agent", 1)
            ]
        ear = post.ear("bb")
        await until(lambda: ear.heard)
        assert await post.store.mail.queues() == [], "deleted before it is handed out"
        assert ear.heard[0]["id"] == ticket.id
        ear.acknowledge()
        assert states == ["queued", "sent", "delivered"]


async def test_a_restart_keeps_what_waits_and_repeats_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        for number in range(5):
            post.say("aa", "bb", number)
        await until(lambda: post.router.kept(Address("bb", "agent")) == 5 and not post.router.mailroom._is_writing)
    async with world(tmp_path, "aa", "bb") as post:
        assert post.router.kept(Address("bb", "agent")) == 5
        post.say("aa", "bb", 5)
        ear = post.ear("bb")
        await until(lambda: len(ear.heard) == 6)
        assert ear.bodies == [0, 1, 2, 3, 4, 5]
        sequence = [message["seq"] for message in ear.heard]
        assert sequence == sorted(set(sequence))
    async with world(tmp_path, "aa", "bb") as post:
        ear = post.ear("bb")
        await asyncio.sleep(0.05)
        assert ear.heard == []


async def test_a_new_message_never_overtakes(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        for number in range(3):
            post.say("aa", "bb", number)
        ear = post.ear("bb")
        post.say("aa", "bb", 3)  # the receiver is there, but the others still wait
        for number in range(4, 3 * WINDOW):
            post.say("aa", "bb", number)
            if number % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(ear.heard) >= WINDOW)
        await asyncio.sleep(0.05)
        assert len(ear.heard) == WINDOW, "no more than a window without a word"
        for place in range(3 * WINDOW):
            await ear.acknowledge_next(place)
        assert ear.bodies == list(range(3 * WINDOW))


async def test_large_messages_fill_a_window_by_their_bytes(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        ear = post.ear("bb")
        for number in range(6):
            post.say("aa", "bb", [number, "x" * 200_000])
        await until(lambda: len(ear.heard) == 2)
        await asyncio.sleep(0.1)
        assert [body[0] for body in ear.bodies] == [0, 1]
        for place in range(6):
            await ear.acknowledge_next(place)
        assert [body[0] for body in ear.bodies] == list(range(6))


async def test_a_full_mailbox_is_told_and_loses_nothing(tmp_path: Path) -> None:
    bounds = replace(Bounds(), mailbox_messages=3)
    async with world(tmp_path, "aa", "bb", bounds=bounds) as post:
        for number in range(3):
            post.say("aa", "bb", number)
        with pytest.raises(TooMany) as full:
            post.say("aa", "bb", 3)
        assert full.value.code == "mailbox_full"
        ear = post.ear("bb")
        await until(lambda: len(ear.heard) == 3)
        _, states = post.say("aa", "bb", 3)
        await until(lambda: len(ear.heard) == 4)
        assert ear.bodies == [0, 1, 2, 3]
        assert "sent" in states


async def test_a_mailbox_is_full_by_bytes_and_all_of_them_together(tmp_path: Path) -> None:
    bounds = replace(Bounds(), mailbox_bytes=3000, kept_bytes=4500)
    async with world(tmp_path, "aa", "bb", "cc", bounds=bounds) as post:
        post.say("aa", "bb", "x" * 1000)
        post.say("aa", "bb", "x" * 1000)
        with pytest.raises(TooMany):
            post.say("aa", "bb", "x" * 1000)
        post.say("aa", "cc", "x" * 1000)
        with pytest.raises(TooMany):
            post.say("aa", "cc", "x" * 1000)
        await until(lambda: not post.router.mailroom._is_writing)
        ear = post.ear("bb")
        await until(lambda: len(ear.heard) == 2)
        post.say("aa", "cc", "x" * 1000)


async def test_the_gateways_mailbox_is_bounded_the_same_way(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", bounds=replace(Bounds(), mailbox_messages=2)) as post:
        post.say("aa", "gateway", 1)
        post.say("aa", "gateway", 2)
        with pytest.raises(TooMany):
            post.say("aa", "gateway", 3)
        ear = post.ear("aa", "gateway")
        await until(lambda: ear.bodies == [1, 2])
        assert {(message["from"], message["to"]) for message in ear.heard} == {("aa", "gateway")}


async def test_what_nobody_fetched_in_time_is_not_delivered(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        ticket, states = post.say("aa", "bb", "short", ttl=0.2)
        post.say("aa", "bb", "long")
        await until(lambda: states == ["queued"])
        await asyncio.sleep(0.25)
        ear = post.ear("bb")  # earlier than the sweep: it is told by the clock, not by the timer
        await until(lambda: ear.heard)
        assert ear.bodies == ["long"]
        assert ticket.state == "expired"
        _, states = post.say("aa", "gateway", 1, ttl=0.1)
        await until(lambda: states == ["queued", "expired"])
        assert post.router.mailroom._kept_bytes == 0
        assert set(post.router.mailroom._mailboxes) == {Address("bb", "agent")}, "an empty mailbox costs nothing"


async def test_the_oldest_connection_gets_all_and_the_next_takes_over(tmp_path: Path) -> None:
    async with world(tmp_path, "aa") as post:
        first, second = post.ear("aa", "gateway"), post.ear("aa", "gateway")
        for number in range(4):
            post.say("aa", "gateway", number)
        assert (first.bodies, second.bodies) == ([0, 1, 2, 3], [])
        first.close()
        post.say("aa", "gateway", 4)
        assert second.bodies == [4]


async def test_a_receiver_that_leaves_while_the_disk_is_read_leaves_the_queue_as_it_was(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        for number in range(5):
            post.say("aa", "bb", number)
        await until(lambda: not post.router.mailroom._is_writing)
        for _ in range(20):
            ear = post.ear("bb")
            ear.close()
            await asyncio.sleep(0)
            assert ear.heard == []
        last = post.ear("bb")
        await until(lambda: len(last.heard) == 5)
        assert last.bodies == [0, 1, 2, 3, 4]


async def test_who_takes_over_while_the_disk_is_read_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        first, ears = post.ear("bb"), []
        real = post.store.mail.take

        async def take(*arguments: Any) -> Any:
            result = await real(*arguments)
            if not ears:
                first.close()
                ears.append(post.ear("bb"))
            return result

        monkeypatch.setattr(post.store.mail, "take", take)
        for number in range(3):  # the third has no room beside the others, which nobody acknowledges
            post.say("aa", "bb", [number, "x" * 200_000])
        await until(lambda: ears and ears[0].heard)
        assert [body[0] for body in first.bodies + ears[0].bodies] == [0, 1, 2]


@pytest.mark.parametrize("to", ["nobody", "dd", "name-of-dd", "ee", "aa\n", "AA"])
async def test_who_is_not_of_the_team_does_not_exist(tmp_path: Path, to: str) -> None:
    people = ("aa", "bb", Person("dd", team="other"), Person("ee", running=False))
    async with world(tmp_path, *people) as post:
        with pytest.raises(NotFound) as refused:
            post.say("aa", to)
        with pytest.raises(NotFound) as absent:
            post.say("aa", "zz")
        assert (refused.value.code, refused.value.detail) == (absent.value.code, absent.value.detail)
        assert refused.value.code == "receiver_not_found"


async def test_names_are_those_of_ones_own_team(tmp_path: Path) -> None:
    people = (Person("aa", name="boss"), Person("bb", name="hand"), Person("cc", team="other", name="hand"))
    async with world(tmp_path, *people) as post:
        ear, foreign = post.ear("bb"), post.ear("cc")
        post.say("aa", "hand", 1)
        assert (ear.bodies, foreign.bodies) == ([1], [])
        assert ear.heard[0]["to"] == "bb"
        assert [one.touched for one in people] == [0, 1, 0], "whoever is written to is not idle"


async def test_an_agent_that_does_not_run_receives_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, Person("aa", running=False)) as post:
        for agent in ("aa", "zz"):
            with pytest.raises(Conflict) as refused:
                post.say("gateway", agent)
            assert refused.value.code == "agent_not_running"


async def test_an_end_drops_what_waits_for_the_agent_and_a_removal_what_it_sent(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        _, to_agent = post.say("gateway", "aa", 1)
        post.say("gateway", "aa", 2)
        _, to_gateway = post.say("aa", "gateway", "the result")
        await until(lambda: to_agent == ["queued"] and to_gateway == ["queued"])
        ticket, unwritten = post.say("gateway", "aa", 3)
        post.people["aa"].running = False
        post.router.agent_ended("aa")
        await until(lambda: post.dropped and ticket.settled)
        assert post.dropped == [("aa", "agent", 3)]
        assert unwritten == ["dropped"]
        ear = post.ear("aa", "gateway")
        await until(lambda: ear.bodies == ["the result"])
        post.say("aa", "gateway", "unread")
        post.router.agent_removed("aa")
        assert ear.is_gone
        del post.people["aa"]
        await until(lambda: not post.router.mailroom._tasks)
        assert await post.store.mail.queues() == []
        assert (post.router.mailroom._mailboxes, post.router.mailroom._kept_bytes, post.router._numbers) == ({}, 0, {})


async def test_mail_of_agents_that_are_gone_is_dropped_at_the_start(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        kept = [
            KeptMessage(agent, side, f"{agent}{side}", b"{}", time.time() + 60)
            for agent, side in (("aa", "agent"), ("aa", "gateway"), ("bb", "agent"), ("zz", "agent"), ("zz", "gateway"))
        ]  # type: ignore[arg-type]
        await post.store.mail.add(kept)
        post.store._connection.execute("UPDATE agent SET state = 'exited' WHERE id = 'aa'")
    async with world(tmp_path, "aa", "bb") as post:
        assert sorted(post.dropped) == [("aa", "agent", 1), ("zz", "agent", 1), ("zz", "gateway", 1)]
        assert {(queue.agent, queue.side) for queue in await post.store.mail.queues()} == {
            ("aa", "gateway"),
            ("bb", "agent"),
        }


async def test_a_disk_that_refuses_is_told_and_nothing_is_counted(tmp_path: Path, monkeypatch: Any) -> None:
    async with world(tmp_path, "aa", "bb") as post:

        async def refuse(*_: object) -> None:
            raise Unavailable("store_unavailable", "The disk is full.")

        monkeypatch.setattr(post.store.mail, "add", refuse)
        _, states = post.say("aa", "bb", 1)
        await until(lambda: states == ["store_unavailable"])
        assert (post.router.mailroom._kept_bytes, post.router.mailroom._mailboxes) == (0, {})
        monkeypatch.undo()
        _, states = post.say("aa", "bb", 2)
        await until(lambda: states == ["queued"])


async def test_a_disk_that_refuses_is_asked_again_at_its_pace_not_at_the_senders(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("isolator.messages.mailroom._RETRY", 0.3)
    asked = 0

    async def refuse(*_: object) -> None:
        nonlocal asked
        asked += 1
        raise Unavailable("store_unavailable", "The disk is full.")

    async with world(tmp_path, "aa", "bb") as post:
        post.say("aa", "bb", 0)
        await until(lambda: not post.router.mailroom._is_writing)
        monkeypatch.setattr(post.store.mail, "take", refuse)
        ear = post.ear("bb")
        for number in range(1, 50):
            _, states = post.say("aa", "bb", number)
            await until(lambda states=states: states == ["queued"])
        assert asked <= 2
        monkeypatch.undo()
        await until(lambda: len(ear.heard) == 32)
        assert ear.bodies == list(range(32))


@pytest.mark.parametrize(
    ("body", "error"),
    [("x" * 300_000, TooLarge), (float("inf"), BadRequest), ("\ud800", BadRequest), ({"a": "\udfff"}, BadRequest)],
)
async def test_bodies_that_are_no_json_or_too_large(tmp_path: Path, body: Any, error: type[IsolatorError]) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        with pytest.raises(error):
            post.say("gateway", "aa", body)
        assert post.router.mailroom._mailboxes == {}


async def test_a_line_has_no_line_break_of_any_kind(tmp_path: Path) -> None:
    async with world(tmp_path, "aa") as post:
        lines: list[bytes] = []
        post.router.subscribe(Address("aa", "agent"), lines.append, lambda: None)
        body = "a\nb\rc\u2028d\u2029e\x00"
        post.say("gateway", "aa", body)
        assert len(lines[0].decode().splitlines()) == 1
        assert json.loads(lines[0])["body"] == body


async def test_progress_is_kept_told_twice_a_second_and_the_last_always(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        for number in range(100):
            ticket, _ = post.say("aa", "gateway", {"fraction": number / 100}, type="progress")
            assert ticket.state == "delivered"
        post.say("bb", "gateway", {"text": "other"}, type="progress")
        assert post.kept == {"aa": {"fraction": 0.99}, "bb": {"text": "other"}}
        await until(lambda: len(post.told) == 2)
        post.say("aa", "gateway", {"fraction": 1}, type="progress")
        post.say("aa", "gateway", {"text": "done", "fraction": 1, "elapsed": 3}, type="progress")
        await until(lambda: len(post.told) == 3)
        assert post.told == [
            ("aa", {"fraction": 0.99}),
            ("bb", {"text": "other"}),
            ("aa", {"text": "done", "fraction": 1.0, "elapsed": 3.0}),
        ]
        assert post.router.kept(Address("aa", "gateway")) == 0
        await until(lambda: post.router._progress._task is None)


@pytest.mark.parametrize("body", [1, "x", {"fraction": 1.1}, {"text": "x" * 201}, {"elapsed": -1}, {"other": 1}])
async def test_progress_that_is_none(tmp_path: Path, body: Any) -> None:
    async with world(tmp_path, "aa") as post:
        with pytest.raises(BadRequest):
            post.say("aa", "gateway", body, type="progress")
        assert post.kept == {}


async def test_agents_without_connections_cost_no_task_and_no_timer(tmp_path: Path) -> None:
    async with world(tmp_path, "aa", "bb") as post:
        ear = post.ear("bb")
        post.say("aa", "bb", 1)
        ear.acknowledge()
        ear.close()
        await asyncio.sleep(0.01)
        assert (post.router.mailroom._mailboxes, post.router.mailroom._tasks, post.router.mailroom._timer) == (
            {},
            set(),
            None,
        )


Act = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(["aa", "bb", "gateway"]), st.sampled_from([10, 200_000])),
    st.tuples(st.just("connect")),
    st.tuples(st.just("break"), st.integers(0, 3)),
    st.tuples(st.just("acknowledge"), st.integers(0, 3), st.integers(0, 40)),
    st.tuples(st.just("turn"), st.integers(0, 3)),
    st.tuples(st.just("restart")),
)


@settings(max_examples=60, deadline=None)
@given(acts=st.lists(Act, max_size=60))
async def test_order_and_at_most_once_whatever_comes_and_goes(acts: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        await _live_through(Path(folder), acts)


class Receivers:
    """Who receives for one agent while it lives, and a log of all they were handed."""

    def __init__(self, post: World, log: list[dict[str, Any]]) -> None:
        self._post = post
        self._log = log
        self._open: list[tuple[Subscription, list[str]]] = []

    def connect(self) -> None:
        mine: list[str] = []

        def hand(line: bytes) -> None:
            self._log.append(json.loads(line))
            mine.append(self._log[-1]["id"])

        if len(self._open) < 4:
            self._open.append((self._post.router.subscribe(Address("cc", "agent"), hand, lambda: None), mine))

    def part(self, place: int) -> None:
        if self._open:
            self._open.pop(place % len(self._open))[0].close()

    def acknowledge(self, place: int, which: int) -> None:
        if self._open and (chosen := self._open[place % len(self._open)])[1]:
            chosen[0].acknowledge(chosen[1][which % len(chosen[1])])

    async def take_the_rest(self) -> None:
        """One stays and acknowledges all, until nothing waits any more."""
        while self._open:
            self.part(0)
        self.connect()
        ((subscription, mine),) = self._open

        def is_empty() -> bool:
            for number in mine:
                subscription.acknowledge(number)
            return self._post.router.kept(Address("cc", "agent")) == 0

        await until(is_empty)
        await asyncio.sleep(0.01)


async def _live_through(folder: Path, acts: list[tuple[Any, ...]]) -> None:
    sent: dict[str, list[int]] = {"aa": [], "bb": [], "gateway": []}
    log: list[dict[str, Any]] = []  # everything any receiver was handed, in order
    left = [(number, *act) for number, act in enumerate(acts)]
    while True:
        async with world(folder, "aa", "bb", "cc") as post:
            receivers = Receivers(post, log)
            while left and left[0][1] != "restart":
                match left.pop(0):
                    case (number, "send", sender, size):
                        with contextlib.suppress(TooMany):
                            post.say(sender, "cc", [number, "x" * size])
                            sent[sender].append(number)
                    case (_, "connect"):
                        receivers.connect()
                    case (_, "break", place):
                        receivers.part(place)
                    case (_, "acknowledge", place, which):
                        receivers.acknowledge(place, which)
                    case (_, "turn", turns):
                        await asyncio.sleep(0.002 * turns)
            if not left:
                await receivers.take_the_rest()
                assert post.router.mailroom._kept_bytes == 0
                break
            left.pop(0)
    assert max(Counter(message["id"] for message in log).values(), default=1) == 1, "handed out twice"
    for sender, numbers in sent.items():
        got = [message["body"][0] for message in log if message["from"] == sender]
        assert got == numbers, f"{sender}: every message once and in order"
