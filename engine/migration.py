"""What two engines say to one another when a parked request moves: frozen, free of torch and of ray.

The request goes in two phases. The target takes host memory and the bytes, and says that it has everything;
only then does the source let go. It runs there once its ingress calls for it (`Migrated`): the ingress alone
knows that no token of the source is still to come, so no token is said twice and none is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from engine.messages import GenerateRequest, TokenDelta

MigrationOutcome = Literal["migrated", "not_movable", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class KvShape:
    """What must agree for one engine's bytes of KV to mean the same in another.

    Attributes:
        source: where the weights came from.
        num_ranks: of the TP group; rank i's chunks go to rank i.
        num_kv_heads: of a rank.
        weight_bytes: of a rank: a check that the same source still held the same model.
    """

    model_id: str
    source: str
    dtype: str
    vocab_size: int
    num_ranks: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers_per_group: int
    tokens_per_chunk: int
    chunk_bytes: int
    weight_bytes: int

    def difference(self, other: KvShape) -> str:
        """What differs, by name; empty if nothing does."""
        for one in fields(self):
            ours, theirs = getattr(self, one.name), getattr(other, one.name)
            if ours != theirs:
                return f"{one.name} is {theirs} there and {ours} here"
        return ""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A parked sequence but for its KV: what another engine goes on from, token for token.

    Clocks of two machines have nothing in common, so times are ages.

    Attributes:
        seed: of its draws; which draw is next follows from the number of its tokens.
        longest: tokens it may have in the end.
        age_s, first_token_age_s: since it arrived, and since its first token.
        ttft_slo_s, tpot_slo_s: what its client was promised.
        num_migrations: this one included.
        held: tokens ahead of its client's pace: in how many seconds each is due, and the delta.
    """

    request: GenerateRequest
    seed: int
    output_token_ids: tuple[int, ...]
    longest: int
    age_s: float
    first_token_age_s: float
    ttft_slo_s: float
    tpot_slo_s: float
    num_preemptions: int
    num_cached_tokens: int
    num_migrations: int
    held: tuple[tuple[float, TokenDelta], ...] = ()


@dataclass(frozen=True, slots=True)
class MigrationOffer:
    """A request that could move. Nothing has changed at the source but that it stays parked meanwhile.

    Attributes:
        migration_id: unguessable: whoever knows it may take the request over.
        num_rows: host chunks of each layer group.
    """

    migration_id: str = field(repr=False)
    request_id: str
    shape: KvShape
    num_rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class Door:
    """Where one rank of the target takes bytes in (`engine.memory.kv_stream`).

    Attributes:
        address: ZMQ endpoint.
        secret: what a sender is believed by.
        shared_path: of the window in shared memory, for a sender on the same node; empty if there is none.
        window: chunks that may be under way at a time.
    """

    address: str
    secret: bytes = field(repr=False)
    shared_path: str = field(repr=False)
    window: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The target has host memory for an offer: a door for each rank."""

    doors: tuple[Door, ...]


@dataclass(frozen=True, slots=True)
class Declined:
    """Why a request does not move; it is where it was.

    Attributes:
        outcome: whether it cannot, the target does not take it, or the way broke.
    """

    outcome: MigrationOutcome
    reason: str


@dataclass(frozen=True, slots=True)
class Migrated:
    """A call's answer: the request is at another group, which waits for its ingress to call for it there.

    Attributes:
        group_id: of the target's Serve replica.
    """

    migration_id: str = field(repr=False)
    group_id: str


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """How one migration ended, for those who count.

    Attributes:
        num_bytes: of KV that went, of all ranks.
        seconds: from the order until the source let go.
    """

    outcome: MigrationOutcome
    reason: str = ""
    request_id: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
