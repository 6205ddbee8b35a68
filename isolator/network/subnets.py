"""Which piece of the subnet pool a team gets. Pure.

The engine's own pools end after about thirty networks; ours is cut into equal pieces, and the first free one is
taken. What the engine says is in use elsewhere is passed over.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from isolator.model.errors import TooMany


def free_subnet(pool: str, prefix: int, taken: Collection[str]) -> str:
    """The first piece of `pool` of length `prefix` that overlaps nothing taken, in CIDR form.

    Raises:
        TooMany: `subnets_exhausted`.
    """
    exact = set(taken)
    odd = [network for network in (ipaddress.IPv4Network(item) for item in taken) if network.prefixlen != prefix]
    for piece in ipaddress.IPv4Network(pool).subnets(new_prefix=prefix):
        if str(piece) not in exact and not any(piece.overlaps(network) for network in odd):
            return str(piece)
    raise TooMany(
        "subnets_exhausted",
        f"Every /{prefix} of {pool} is in use. Delete teams, or widen ISOLATOR_SUBNET_POOL.",
    )
