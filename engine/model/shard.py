"""How a model is divided among the ranks of a TP group: which heads, columns and tokens a rank has.

Megatron's division: queries, keys, values, gate and up by their outputs, the attention's output and down by
their inputs, so that a layer needs two sums over the ranks. Embedding and head are divided by tokens.

Shares are of one size on every rank, because chunks are: a rank's share of keys and values fills the same
rows of the same chunks everywhere. What does not divide is filled up with zeros, which change no result: nine
query heads over three KV heads are six over two on each of two ranks, three of them nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.errors import ConfigError
from engine.model.architecture import ModelConfig

# Products are fastest, and rows aligned, in multiples of this many elements.
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Span:
    """A rank's part of a dimension.

    Attributes:
        begin: where it begins in the whole.
        count: how much of the whole it has; 0 if it begins behind its end.
        size: its length; what it has beyond `count` is zero.
        whole: length of the dimension.
    """

    begin: int
    count: int
    size: int
    whole: int

    @classmethod
    def of(cls, begin: int, size: int, whole: int, end: int | None = None) -> Span:
        """`size` from `begin` on, as far as there are any before `end`."""
        return cls(begin, max(0, min(size, (whole if end is None else end) - begin)), size, whole)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model.

    Attributes:
        config: the architecture of the whole model.
        rank: 0 to `size - 1`.
        size: ranks of the group.
    """

    config: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size > self.config.num_heads:
            raise ConfigError(
                f"tensor_parallel_size is {self.size}, and the model has {self.config.num_heads} attention "
                "heads: lower it"
            )

    @property
    def local(self) -> ModelConfig:
        """The architecture of the share: what a rank computes, as if it were a model."""
        if self.size == 1:
            return self.config
        return replace(
            self.config,
            num_heads=self._num_kv_heads * self._queries_per_kv,
            num_kv_heads=self._num_kv_heads,
            intermediate_size=self.inner.size,
        )

    @property
    def queries(self) -> Span:
        """Rows of the query projection: whole heads."""
        config, dim = self.config, self.config.head_dim
        group, num_heads = config.num_heads // config.num_kv_heads, self.local.num_heads
        kv_head, part = divmod(self.rank, self._sharers)
        first = kv_head * self._num_kv_heads * group + part * self._queries_per_kv
        end = min(config.num_heads, (kv_head + 1) * self._num_kv_heads * group)  # the next rank's KV heads
        return Span.of(first * dim, num_heads * dim, config.num_heads * dim, end * dim)

    @property
    def keys(self) -> Span:
        """Rows of the key projection, and of the value projection."""
        dim, first = self.config.head_dim, self.rank // self._sharers * self._num_kv_heads
        return Span.of(first * dim, self._num_kv_heads * dim, self.config.num_kv_heads * dim)

    @property
    def inner(self) -> Span:
        """Rows of gate and up, columns of down."""
        return self._span(self.config.intermediate_size)

    @property
    def tokens(self) -> Span:
        """Rows of the embedding and of the head."""
        return self._span(self.config.vocab_size)

    @property
    def _num_kv_heads(self) -> int:
        return -(-self.config.num_kv_heads // self.size)

    @property
    def _sharers(self) -> int:
        """Ranks that have the same KV head, where there are fewer of those than ranks."""
        return max(1, self.size // self.config.num_kv_heads)

    @property
    def _queries_per_kv(self) -> int:
        return -(-(self.config.num_heads // self.config.num_kv_heads) // self._sharers)

    def _span(self, whole: int) -> Span:
        if self.size == 1:
            return Span.of(0, whole, whole)
        size = -(-whole // self.size)
        size = -(-size // _ALIGN) * _ALIGN
        return Span.of(self.rank * size, size, whole)
