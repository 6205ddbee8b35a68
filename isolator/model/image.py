"""An image as a spawn needs to know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The image a name stands for: its digest, the Python inside that runs the guest, and its own environment."""

    reference: str
    digest: str
    interpreter: str
    environment: tuple[tuple[str, str], ...] = ()
