"""How often: a bucket of tokens, with no timer."""

from __future__ import annotations

import time

_BURST_SECONDS = 2.0
_REST = 0.25
_BYTES_A_TOKEN = 4 * 1024


class Bucket:
    """Holds two seconds' worth. `take` costs nothing but a clock."""

    __slots__ = ("_at", "_rate", "_tokens")

    def __init__(self, rate: float) -> None:
        """Full at first; `rate` tokens a second."""
        self._rate = rate
        self._tokens = rate * _BURST_SECONDS
        self._at = time.monotonic()

    def take(self, size: int) -> float:
        """Take the price of a message of that many bytes; 0, or the seconds to wait before the next try.

        Each 4 KiB more count as one more message: large ones cost as much to read.
        """
        now = time.monotonic()
        most = self._rate * _BURST_SECONDS
        self._tokens = min(most, self._tokens + (now - self._at) * self._rate)
        self._at = now
        price = min(most, 1.0 + size // _BYTES_A_TOKEN)
        if self._tokens >= price:
            self._tokens -= price
            return 0.0
        return max(_REST, round((price - self._tokens) / self._rate, 3))
