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
    """`batch` sequences, each with `queries` new tokens after `cached` older ones."""

    batch: int
    queries: int
    cached: int
    heads: Heads = Heads()

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
        """Such as `decode 64 x 8192` or `prefill 8 x 2048 + 14336`."""
        if self.is_decode:
            return f"decode {self.batch} x {self.context}"
        return f"prefill {self.batch} x {self.queries} + {self.cached}"

    @property
    def kv_bytes(self) -> int:
        """Keys and values, read once."""
        return self.batch * self.context * self.heads.kv * self.heads.dim * 2 * 2

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
        self.starts = self._int32([index * problem.queries for index in range(problem.batch + 1)])
        self.lens = self._int32([problem.context] * problem.batch)
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _shuffle(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)

    @cached_property
    def pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Our layout: (rows, 2, T, kv heads, dim) of one layer inside its chunks, and first rows.

        Memory beyond a context is NaN where a row is not full.
        """
        problem = self.problem
        rows = -(-problem.context // TOKENS_PER_ROW)
        shape = (problem.batch * rows, LAYERS, 2, TOKENS_PER_ROW, problem.heads.kv, problem.heads.dim)
        kv = torch.full(shape, float("nan"), **self._like)[:, LAYER]
        order = self._shuffle(problem.batch)
        for sequence, place in enumerate(order.tolist()):
            for index, source in enumerate((self.k, self.v)):
                for row in range(rows):
                    tokens = source[sequence, row * TOKENS_PER_ROW : (row + 1) * TOKENS_PER_ROW]
                    kv[place * rows + row, index, : tokens.shape[0]] = tokens
        return kv, order * rows

    def pages(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Paged caches of K and V, (pages, size, kv heads, dim), and the int32 block table.

        Raises:
            ValueError: the context is no whole number of pages.
        """
        if size not in self._pages:
            problem = self.problem
            if problem.context % size:
                raise ValueError(f"{problem.name} is no whole number of pages of {size} tokens")
            count = problem.batch * problem.context // size
            order = self._shuffle(count)
            k, v = torch.empty((2, count, size, problem.heads.kv, problem.heads.dim), **self._like)
            k[order], v[order] = self.k.reshape(k.shape), self.v.reshape(v.shape)
            self._pages[size] = k, v, order.view(problem.batch, -1).int()
        return self._pages[size]

    def token_places(self, count: int, page: int) -> torch.Tensor:
        """Flat int64 places of each sequence's first `count` tokens in the caches of `pages(page)`."""
        table = self.pages(page)[2].long()
        tokens = torch.arange(count, device=self.device)
        return (table[:, tokens // page] * page + tokens % page).flatten()
