"""Attention problems of one layer: a batch, its keys and values, and how each engine lays them out.

Llama-3.1-8B's heads in bfloat16. The same keys and values go into every layout, so that all kernels
compute the same and can be compared; sequences and pages are shuffled, as an engine in use has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

TOKENS_PER_ROW, LAYERS, LAYER = 128, 4, 1  # of our chunks for this model; the layer that is read


@dataclass(frozen=True)
class Heads:
    """Heads of a layer."""

    query: int = 32
    kv: int = 8
    dim: int = 128

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.dim**-0.5)


@dataclass(frozen=True)
class Problem:
    """`batch` sequences, each with `queries` new tokens after `cached` older ones.

    The first `shared` of those are the same in all sequences and lie in memory once: whole rows and pages.
    """

    batch: int
    queries: int
    cached: int
    heads: Heads = Heads()
    shared: int = 0

    @property
    def context(self) -> int:
        """Keys of a sequence, new tokens included."""
        return self.queries + self.cached

    @property
    def is_decode(self) -> bool:
        """One new token a sequence."""
        return self.queries == 1

    @property
    def name(self) -> str:
        """Such as `decode 64 x 8192`, `decode 256 x (4096 shared + 128)` or `prefill 8 x 2048 + 14336`."""
        if self.is_decode:
            own = self.context - self.shared
            return f"decode {self.batch} x {f'({self.shared} shared + {own})' if self.shared else own}"
        cached = f"({self.shared} shared + {self.cached - self.shared})" if self.shared else self.cached
        return f"prefill {self.batch} x {self.queries} + {cached}"

    @property
    def kv_bytes(self) -> int:
        """Keys and values, read once: shared ones once for all sequences."""
        tokens = self.shared + self.batch * (self.context - self.shared)
        return tokens * self.heads.kv * self.heads.dim * 2 * 2

    @property
    def flop(self) -> float:
        """Of the causal half: scores and weighted values, 2 a multiply-add."""
        pairs = self.queries * self.cached + self.queries * (self.queries + 1) / 2
        return 4.0 * self.batch * self.heads.query * self.heads.dim * pairs


class Case:
    """The tensors of a problem. Layouts are made on first use and shared by whoever reads them.

    Attributes:
        q: (batch * queries, query heads, dim).
        k, v: (batch, context, kv heads, dim).
        starts: (batch + 1,) int32, first query of each sequence.
        lens: (batch,) int32, context of each.
    """

    def __init__(
        self, problem: Problem, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        heads = problem.heads
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, **self._like, generator=generator)

        self.problem, self.device, self._generator = problem, device, generator
        self._like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.q = normal(problem.batch * problem.queries, heads.query, heads.dim)
        self.k = normal(problem.batch, problem.context, heads.kv, heads.dim)
        self.v = normal(problem.batch, problem.context, heads.kv, heads.dim)
        self.k[:, : problem.shared], self.v[:, : problem.shared] = (
            both[:1, : problem.shared].clone() for both in (self.k, self.v)
        )
        self.starts = self._int32([index * problem.queries for index in range(problem.batch + 1)])
        self.lens = self._int32([problem.context] * problem.batch)
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _shuffle(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)

    @cached_property
    def pool(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Our layout: (rows, 2, T, kv heads, dim) of one layer inside its chunks, and where KV lies in it.

        That is first rows, shared first rows and shared lengths. Rows of the shared prefix come first.
        Memory beyond a context is NaN where a row is not full.

        Raises:
            ValueError: what is shared is no whole number of rows.
        """
        problem = self.problem
        if problem.shared % TOKENS_PER_ROW:
            raise ValueError(f"{problem.name} shares no whole number of rows of {TOKENS_PER_ROW} tokens")
        shared = problem.shared // TOKENS_PER_ROW
        own = -(-problem.context // TOKENS_PER_ROW) - shared
        shape = (shared + problem.batch * own, LAYERS, 2, TOKENS_PER_ROW, problem.heads.kv, problem.heads.dim)
        kv = torch.full(shape, float("nan"), **self._like)[:, LAYER]
        order = self._shuffle(problem.batch)
        self._fill(kv, 0, 0, problem.shared)
        for sequence, place in enumerate(order.tolist()):
            self._fill(kv[shared + place * own :], sequence, problem.shared, problem.context)
        lens = self._int32([problem.shared] * problem.batch)
        return kv, (order * own, torch.zeros_like(order), lens)

    def _fill(self, kv: torch.Tensor, sequence: int, begin: int, end: int) -> None:
        """Write tokens from `begin` to `end` of a sequence into rows from the first on."""
        for index, source in enumerate((self.k, self.v)):
            for row, tokens in enumerate(source[sequence, begin:end].split(TOKENS_PER_ROW)):
                kv[row, index, : tokens.shape[0]] = tokens

    def pages(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Paged caches of K and V, (pages, size, kv heads, dim), and the int32 block table.

        Raises:
            ValueError: the context, or what of it is shared, is no whole number of pages.
        """
        if size not in self._pages:
            problem = self.problem
            if problem.context % size or problem.shared % size:
                raise ValueError(f"{problem.name} is no whole number of pages of {size} tokens")
            shared = problem.shared // size
            count = shared + problem.batch * (problem.context // size - shared)
            shape = (size, problem.heads.kv, problem.heads.dim)
            order = self._shuffle(count)
            k, v = torch.empty((2, count, *shape), **self._like)
            for cache, source in ((k, self.k), (v, self.v)):
                cache[order[:shared]] = source[0, : problem.shared].reshape(-1, *shape)
                cache[order[shared:]] = source[:, problem.shared :].reshape(-1, *shape)
            own = order[shared:].view(problem.batch, -1)
            self._pages[size] = k, v, torch.cat((order[:shared].expand(problem.batch, -1), own), 1).int()
        return self._pages[size]

    def token_places(self, count: int, page: int) -> torch.Tensor:
        """Flat int64 places of each sequence's first `count` tokens in the caches of `pages(page)`."""
        table = self.pages(page)[2].long()
        tokens = torch.arange(count, device=self.device)
        return (table[:, tokens // page] * page + tokens % page).flatten()
