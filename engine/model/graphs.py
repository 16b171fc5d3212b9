"""Which steps replay a CUDA graph, and what size each is filled up to.

A graph has fixed sizes: decodes, prompt tokens, pieces of prompts. There is one for every few decodes,
since most steps are decodes alone, and a coarser grid for decodes beside pieces of prompts. Pieces so long
that the GPU computes them for longer than launching their kernels takes are launched one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from engine.messages import StepPlan

Record = Callable[[Callable[[], object]], Callable[[], object]]

_PROMPT_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Launching a step kernel by kernel takes 12 ms for Llama-3.1-8B, and 512 tokens compute as long (H100).
# Other models differ in the same way in both: by layers, and by what a layer computes.
_WEIGHTS_TIMES_TOKENS = 9.0e9 * 512
MAX_PIECES = 16  # pieces of prompts in a graph; each costs one more row of logits


class GraphShape(NamedTuple):
    """The fixed sizes of a graph: `decodes` tokens of their own, then `prompt_tokens` in `pieces` pieces."""

    decodes: int
    prompt_tokens: int = 0
    pieces: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.decodes + self.prompt_tokens

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return self.decodes + self.pieces


class GraphShapes:
    """The shapes that steps are filled up to.

    Args:
        shapes: any; a step takes the one with the fewest decodes, then the fewest prompt tokens.
    """

    def __init__(self, shapes: Collection[GraphShape]) -> None:
        self._decodes = sorted(shape.decodes for shape in shapes if not shape.pieces)
        self._beside_prompts = sorted({shape.decodes for shape in shapes if shape.pieces})
        self._shapes = frozenset(shapes)

    def fitting(self, plan: StepPlan) -> GraphShape | None:
        """The smallest shape that holds the plan, or None."""
        decodes, pieces = plan.num_decodes, len(plan.pieces) - plan.num_decodes
        if not pieces:
            size = _at_least(self._decodes, decodes)
            return None if size is None or plan.num_rows != decodes else GraphShape(size)
        size = _at_least(self._beside_prompts, decodes)
        tokens = _at_least(_PROMPT_TOKENS, plan.num_tokens - decodes)
        if size is None or tokens is None or pieces > MAX_PIECES:
            return None
        shape = GraphShape(size, tokens, MAX_PIECES)
        return shape if shape in self._shapes else None


def decode_sizes(max_sequences: int) -> list[int]:
    """Numbers of decodes to capture: few enough to start fast, close enough to waste little.

    A step of decodes alone is filled up by seven rows at most, or by a sixteenth of its own.
    """
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_sequences, 32), max_sequences}
    return sorted(size for size in sizes if size <= max_sequences)


def graph_shapes(max_sequences: int, max_tokens: int, num_weights: float) -> list[GraphShape]:
    """Every shape to capture for an engine of those limits, the largest first.

    At 256 sequences of Llama-3.1-8B 90 graphs, which take 3.6 s and 202 MiB (H100).

    Args:
        num_weights: of the model; the smaller, the longer the pieces that are worth a graph.
    """
    longest = max(_PROMPT_TOKENS[0], _WEIGHTS_TIMES_TOKENS / num_weights)
    beside = {0, 8, 16, *range(32, 256, 32), *range(256, 512, 64), *range(512, max_sequences, 128)}
    mixed = [
        GraphShape(decodes, tokens, MAX_PIECES)
        for decodes in beside | {max_sequences}
        for tokens in _PROMPT_TOKENS
        if decodes <= max_sequences and decodes + tokens <= max_tokens and tokens <= longest
    ]
    shapes = [GraphShape(size) for size in decode_sizes(max_sequences)] + mixed
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.rows), reverse=True)


def cuda_graph_recorder(device: torch.device) -> Record:
    """A function that takes work apart into a CUDA graph, and returns what replays it.

    The work is done once before it is recorded, so that cuBLAS has chosen its kernels. All graphs share
    one pool for what cuBLAS and torch allocate inside them.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], object]) -> Callable[[], object]:
        work()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record


def _at_least(sizes: tuple[int, ...] | list[int], count: int) -> int | None:
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else None
