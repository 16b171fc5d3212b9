"""How memory is divided among groups: a node's among their balloons, a device's among their pools. Pure.

Who needs memory gets it at once. What nobody needs any more comes back to the parts that each is entitled
to, so that whoever is busy next finds some. Small differences move nobody: a slab that changes hands costs a
prefix cache, and is pinned again at 1.5 GiB/s. Nothing is promised twice: a group may only have what the
others no longer hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_IDLE = 2  # dead bands: memory that nobody needs moves for larger differences only


@dataclass(frozen=True, slots=True)
class Claim:
    """One group's part. All sizes count every rank.

    Attributes:
        current: what it may hold by the order that is obeyed.
        physical: what it holds, slabs on their way back included.
        want: what it could make use of.
        slab: what it grows and shrinks by.
        may_grow, may_shrink: whether its last move the other way is long enough ago.
        least: without which it cannot serve what it has begun.
        weight: its part, relative to the others', of what nobody wants.
    """

    group_id: str
    current: int
    physical: int
    want: int
    slab: int
    may_grow: bool = True
    may_shrink: bool = True
    least: int = 0
    weight: int = 1


def fair_shares(claims: Sequence[Claim], budget: int, floor: int) -> dict[str, int]:
    """What each should have: all get `floor` and their `least`, as far as the budget goes; small wants are
    met wholly, and large ones get the same each (max-min fairness). What nobody wants is divided by weight.
    """
    wants = {claim.group_id: max(claim.want, claim.least, floor) for claim in claims}
    needy = {claim.group_id: claim.least for claim in claims}
    shares: dict[str, int] = {}
    while True:
        left = max(0, budget - sum(shares.values()))
        level = _level({group_id: want for group_id, want in wants.items() if group_id not in shares}, left)
        below = {group_id for group_id, share in level.items() if share < needy[group_id]}
        if not below:
            break
        for group_id in sorted(below, key=lambda one: (needy[one], one)):
            shares[group_id] = min(needy[group_id], max(0, budget - sum(shares.values())))
    shares |= level
    left = max(0, budget - sum(shares.values()))
    total = sum(claim.weight for claim in claims)
    return {claim.group_id: shares[claim.group_id] + left * claim.weight // total for claim in claims}


def _level(wants: Mapping[str, int], budget: int) -> dict[str, int]:
    """Small wants wholly, the same for each of those that are larger."""
    left, shares = budget, {}
    for place, (group_id, want) in enumerate(sorted(wants.items(), key=lambda item: (item[1], item[0]))):
        shares[group_id] = min(want, left // (len(wants) - place))
        left -= shares[group_id]
    return shares


def divide(claims: Sequence[Claim], budget: int, floor: int, dead_band: int) -> dict[str, int]:
    """The new size of every group's memory.

    Args:
        budget: for all of them.
        floor: least size of each.
        dead_band: moves of less are not worth an order; a slab at least.
    """
    shares = fair_shares(claims, budget, floor)
    lacks = {claim.group_id: _lack(claim, shares[claim.group_id], dead_band) for claim in claims}
    coming = budget - sum(claim.current for claim in claims)  # once slabs that are going have gone
    sizes = _shrink(claims, shares, sum(lacks.values()) - coming)
    free = budget - sum(max(sizes[claim.group_id], claim.physical) for claim in claims)
    _grow(claims, lacks, sizes, free)
    return sizes


def _lack(claim: Claim, share: int, dead_band: int) -> int:
    """What a group should be given: sooner if it needs it than if nobody does, and at once if it cannot do
    without.
    """
    lack = share - claim.current
    if claim.least > claim.current:
        return max(0, lack)
    is_needed = min(share, claim.want) > claim.current
    least = max(dead_band if is_needed else _IDLE * dead_band, claim.slab)
    return lack if claim.may_grow and lack >= least else 0


def _shrink(claims: Sequence[Claim], shares: Mapping[str, int], missing: int) -> dict[str, int]:
    """Sizes after those with more than their share have given, in proportion to that, what is missing."""
    surplus = {
        claim.group_id: claim.current - shares[claim.group_id]
        for claim in claims
        if claim.may_shrink and claim.current - shares[claim.group_id] >= claim.slab
    }
    total, sizes = sum(surplus.values()), {}
    for claim in claims:
        given = 0
        if missing > 0 and claim.group_id in surplus:
            part = min(missing, total) * surplus[claim.group_id] // total
            given = min(-(-part // claim.slab), surplus[claim.group_id] // claim.slab) * claim.slab
        sizes[claim.group_id] = claim.current - given
    return sizes


def _grow(claims: Sequence[Claim], lacks: Mapping[str, int], sizes: dict[str, int], free: int) -> None:
    """Give what is free to those who lack it, in proportion."""
    total = sum(lacks.values())
    for claim in claims:
        lack = lacks.get(claim.group_id, 0)
        if lack > 0 and free > 0:
            part = min(lack, free * lack // total) if total > free else lack
            sizes[claim.group_id] += part // claim.slab * claim.slab
