"""What every rank loads before there is memory to plan: its share of the model, on its device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.memory.arena import BufferSpec
from engine.memory.kv_geometry import KvGeometry
from engine.model.buffers import activation_specs
from engine.model.graphs import GraphShape, graph_shapes
from engine.model.loader import LoadedModel, ModelFacts, load_model
from engine.model.rank_group import RankGroup
from engine.model.sums import Place
from engine.model.warm_up import compile_kernels
from engine.sizes import kv_geometry
from engine.tp.place import RankPlace

if TYPE_CHECKING:
    from engine.model.peers import Peers

GRAPH_BYTES = 512 << 20  # set aside until they are measured; 90 graphs of an 8B model hold 304 MiB (H100)


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's share of a model.

    Attributes:
        specs: the buffers of a forward pass.
        shapes: the CUDA graphs to record, the largest first.
        ranks: those that have the rest; None if there are none.
    """

    model: LoadedModel
    geometry: KvGeometry
    specs: tuple[BufferSpec, ...]
    shapes: list[GraphShape]
    ranks: RankGroup | None


def load_share(
    config: EngineConfig,
    facts: ModelFacts,
    place: RankPlace | None = None,
    group_class: type[RankGroup] = RankGroup,
) -> Share:
    """Join the other ranks, if there are any, and load.

    Raises:
        ModelLoadError: the weights are missing, damaged or not supported.
        EngineDeadError: the other ranks did not come.
    """
    ranks = None if place is None else group_class(place.rank, place.size, place.store, facts.device)
    peers = None if ranks is None else _find_peers(config, facts, ranks)
    geometry = kv_geometry(facts, config.memory)
    with ThreadPoolExecutor(1) as beside:
        compiled = beside.submit(compile_kernels, facts, geometry)
        model = load_model(config, facts, ranks, peers)
        compiled.result()
    specs = activation_specs(facts.shard, facts.dtype, facts.kernels)
    return Share(model, geometry, specs, _graph_shapes(config, model), ranks)


def _find_peers(config: EngineConfig, facts: ModelFacts, ranks: RankGroup) -> Peers | None:
    if facts.device.type != "cuda":
        return None
    from engine.model.peers import find_peers  # imports Triton and the CUDA driver

    width, most = facts.config.hidden_size, config.scheduler.largest_step
    return find_peers(ranks, facts.device, Place, most, width, facts.dtype)


def _graph_shapes(config: EngineConfig, model: LoadedModel) -> list[GraphShape]:
    if model.facts.device.type != "cuda" or config.enforce_eager:
        return []
    limits, num_weights = config.scheduler, model.weight_bytes / model.facts.dtype.itemsize
    return graph_shapes(limits.max_num_seqs, limits.max_num_batched_tokens, num_weights)
