"""Each team gets a piece of the pool that overlaps nothing else's, until there are none."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.model.errors import TooMany
from isolator.network.subnets import free_subnet


def test_the_first_free_piece_is_taken() -> None:
    assert free_subnet("10.208.0.0/12", 24, []) == "10.208.0.0/24"
    assert free_subnet("10.208.0.0/12", 24, ["10.208.0.0/24", "10.208.2.0/24"]) == "10.208.1.0/24"


def test_five_hundred_teams_fit() -> None:
    taken: set[str] = set()
    for _ in range(500):
        taken.add(free_subnet("10.208.0.0/12", 24, taken))
    assert len(taken) == 500


def test_a_piece_of_another_size_is_not_overlapped() -> None:
    # left from when the prefix was set otherwise
    assert free_subnet("10.208.0.0/12", 24, ["10.208.0.0/22", "10.208.4.128/28"]) == "10.208.5.0/24"


def test_the_end_of_the_pool_is_told() -> None:
    pieces = {f"192.168.0.{n * 16}/28" for n in range(16)}
    with pytest.raises(TooMany) as caught:
        free_subnet("192.168.0.0/24", 28, pieces)
    assert caught.value.code == "subnets_exhausted"
    assert "ISOLATOR_SUBNET_POOL" in caught.value.detail
    assert free_subnet("192.168.0.0/24", 28, pieces - {"192.168.0.240/28"}) == "192.168.0.240/28"


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 28), st.integers(1, 40), st.sets(st.integers(0, 255), max_size=5))
def test_pieces_never_overlap(prefix: int, count: int, odd: set[int]) -> None:
    taken = {f"10.208.0.{number}/32" for number in odd}
    for _ in range(count):
        piece = ipaddress.IPv4Network(free_subnet("10.208.0.0/12", prefix, taken))
        assert piece.prefixlen == prefix
        assert piece.subnet_of(ipaddress.IPv4Network("10.208.0.0/12"))
        assert not any(piece.overlaps(ipaddress.IPv4Network(other)) for other in taken)
        taken.add(str(piece))
