"""How the residual stream takes in what half a layer computed, of which each rank of a TP group has a part.

Three ways of one meaning: one rank's product is the sum; few rows are summed by a kernel that writes into the
other ranks' memory; more, and where GPUs do not reach one another, by the collectives.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import torch

from engine.model.rank_group import RankGroup
from kernels.backend import Kernels

if TYPE_CHECKING:
    from engine.model.peers import Peers  # imports Triton and the CUDA driver


class Place(IntEnum):
    """Whose parts are summed. Two sums that follow one another have different places."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


class Sums(Protocol):
    """A way to sum."""

    def add(self, place: Place, hidden: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> None:
        """Add the parts to the residual, and norm that into `hidden`.

        Args:
            hidden: (tokens, width), this rank's part. That of embeddings is in `residual` instead.
            residual: (tokens, width).
            norm: (width,).
        """


class OneRank:
    """There is nothing to sum."""

    def __init__(self, kernels: Kernels, eps: float) -> None:
        self._kernels = kernels
        self._eps = eps

    def add(self, place: Place, hidden: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> None:
        """See `Sums`."""
        if place is Place.EMBEDDING:
            self._kernels.rms_norm(residual, norm, self._eps, out=hidden)
        else:
            self._kernels.add_rms_norm(hidden, residual, norm, self._eps, out=hidden)


class Collective(OneRank):
    """By NCCL, or gloo."""

    def __init__(self, kernels: Kernels, eps: float, ranks: RankGroup) -> None:
        super().__init__(kernels, eps)
        self._ranks = ranks

    def add(self, place: Place, hidden: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> None:
        """See `Sums`."""
        self._ranks.sum(residual if place is Place.EMBEDDING else hidden)
        super().add(place, hidden, residual, norm)


class ThroughPeers:
    """By writing the part into the other ranks' memory."""

    def __init__(self, peers: Peers, eps: float) -> None:
        self._peers = peers
        self._eps = eps

    def add(self, place: Place, hidden: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> None:
        """See `Sums`."""
        is_first = place is Place.EMBEDDING
        part = residual if is_first else hidden
        self._peers.add(place, part, residual, norm, self._eps, hidden, has_residual=not is_first)


class Summing:
    """Which way a step of so many tokens is summed.

    Args:
        eps: of the norms.
        ranks: of the group; None is one rank alone.
        peers: their memory, where GPUs reach one another.
    """

    def __init__(self, kernels: Kernels, eps: float, ranks: RankGroup | None, peers: Peers | None) -> None:
        self._any: Sums = OneRank(kernels, eps) if ranks is None else Collective(kernels, eps, ranks)
        self._few: Sums = self._any if peers is None else ThroughPeers(peers, eps)
        self._most_few = 0 if peers is None else peers.max_tokens

    def of(self, num_tokens: int) -> Sums:
        """The way for that many."""
        return self._few if num_tokens <= self._most_few else self._any
