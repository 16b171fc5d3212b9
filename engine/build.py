"""From a configuration to a running engine: the only place where its parts are wired together.

Sizes are decided here, once: how the KV fills chunks, how many chunks there are, and the longest
sequence they can hold.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Specs

import torch
from tqdm import tqdm

from engine.config import EngineConfig, MemoryConfig, SchedulerConfig
from engine.core import Engine
from engine.device import free_bytes, make_driver, make_link, pool_room, shared_name, wait_for_shared
from engine.footprint import Footprint
from engine.memory.balloon import Balloon
from engine.memory.blocks import TokenChain
from engine.memory.host_memory import available_bytes
from engine.memory.kv_stream import KvStreams, KvTransport
from engine.memory.pool import MemoryPool
from engine.messages import EngineInfo, Piece, SamplingParams, StepPlan
from engine.model.graphs import GraphShape, cuda_graph_recorder
from engine.model.loader import read_model
from engine.model.rank_group import RankGroup
from engine.model.runner import ModelRunner
from engine.model.sampler import Sampler, SampleRow
from engine.outlet import Publish
from engine.scheduler import Scheduler
from engine.sizes import fit_model_len
from engine.tp.group_runner import GroupRunner
from engine.tp.leader import Leader
from engine.tp.place import RankPlace
from engine.tp.share import GRAPH_BYTES, Share, load_share

logger = logging.getLogger(__name__)

_SLOTS_PER_SEQUENCE = 4  # addresses only: finished conversations keep theirs while their KV is cached


def build_engine(
    config: EngineConfig,
    publish: Publish,
    clock: Callable[[], float] = time.monotonic,
    place: RankPlace | None = None,
    group_class: type[RankGroup] = RankGroup,
    host: str = "127.0.0.1",
) -> Engine:
    """Load the model and make an engine that is ready to step, in the calling thread.

    Args:
        place: of the first rank, where `config.tensor_parallel_size` is more than one; the others are
            `engine.tp.follower.follow` in processes of their own.
        group_class: the collectives of the ranks.
        host: address of this node, by which engines of other nodes send parked sequences here.

    Raises:
        ModelLoadError: the model is missing, damaged or not supported.
        ConfigError: the pool cannot hold one sequence, or a limit exceeds the model's.
        EngineDeadError: a rank did not come, or ended.
    """
    started, limits = clock(), config.scheduler
    leader = None if place is None else Leader(place)
    facts = read_model(config)
    footprint = Footprint(facts.device, None if leader is None else leader.release_unused)
    wait_for_shared(facts.device, config.memory, clock)
    share = load_share(config, facts, place, group_class)
    sampler = Sampler(
        facts.config.vocab_size, facts.config.eos_token_ids, facts.device, limits.max_num_seqs, facts.kernels
    )
    memory = _Device(config.memory, share, leader, host)
    max_model_len = fit_model_len(
        config, facts.config.max_context, share.geometry, share.specs, memory.num_chunks
    )
    pool = _make_pool(config, share, memory, max_model_len)
    _add_balloon(pool, config, memory)
    scheduler = Scheduler(limits, pool, max_model_len, facts.config.eos_token_ids, clock)
    runner = _runner(share, pool, sampler, limits, leader)
    _warm_up(pool, runner, sampler)
    graph_bytes = footprint.bytes_of(
        lambda: _capture_graphs(pool, runner, share.shapes, facts.device, clock), lambda: pool.created_bytes
    )
    _settle_budget(pool, config.memory, facts.device, leader)
    footprint.started(share.model.weight_bytes, graph_bytes, pool.created_bytes)
    info = _describe(config, share, max_model_len, pool.chunks.total, clock() - started)
    steps_ahead = 1 if facts.device.type == "cuda" else 0
    return Engine(config, info, pool, scheduler, runner, sampler, publish, clock, steps_ahead, footprint)


class _Device:
    """The drivers of an engine's memory, on all ranks if there are several.

    Attributes:
        num_chunks: the pool's budget, that of the rank with the least room.
    """

    def __init__(self, config: MemoryConfig, share: Share, leader: Leader | None, host: str) -> None:
        device, chunk_bytes = share.model.facts.device, share.geometry.chunk_bytes
        self.vm, self.num_chunks = make_driver(
            device, chunk_bytes, config, GRAPH_BYTES if share.shapes else 0
        )
        self.copies, self.slabs = make_link(device, chunk_bytes)
        self.transport: KvTransport = KvStreams(host, chunk_bytes)
        if leader is not None:
            self.num_chunks = min(self.num_chunks, leader.wait_until_ready())
            self.transport = leader.transport(self.transport, host)
            self.vm, self.copies = leader.memory(self.vm), leader.copies(self.copies)
            self.slabs = leader.slabs(self.slabs)


def _make_pool(config: EngineConfig, share: Share, memory: _Device, max_model_len: int) -> MemoryPool:
    settings, limits = config.memory, config.scheduler
    return MemoryPool(
        memory.vm,
        memory.num_chunks,
        settings.mode,
        share.geometry,
        share.specs,
        limits.max_num_seqs,
        max_model_len,
        limits.largest_step,
        share.model.facts.dtype,
        [shape.decodes for shape in reversed(share.shapes) if not shape.pieces],
        limits.max_num_seqs * (_SLOTS_PER_SEQUENCE if settings.enable_prefix_caching else 1),
        settings.enable_prefix_caching,
    )


def _add_balloon(pool: MemoryPool, config: EngineConfig, device: _Device) -> None:
    """Let sequences be parked in host memory, unless that is switched off, or every slot keeps its memory."""
    memory, on_gpu = config.memory, config.device == "cuda"
    nbytes = memory.balloon_bytes
    if nbytes is None:
        # Each rank has its own, of the same host.
        share = memory.balloon_share / config.tensor_parallel_size
        nbytes = int(available_bytes() * share) if on_gpu else 0
    num_chunks = nbytes // device.vm.chunk_bytes
    if memory.mode == "static" or not num_chunks:
        return
    balloon = Balloon(
        device.slabs,
        device.vm.chunk_bytes,
        num_chunks,
        min(num_chunks, max(1, memory.balloon_slab_bytes // device.vm.chunk_bytes)),
        is_filled=on_gpu and memory.balloon_bytes is not None,
    )
    pool.add_balloon(balloon, device.copies, device.transport)


def _settle_budget(
    pool: MemoryPool, memory: MemoryConfig, device: torch.device, leader: Leader | None
) -> None:
    """Now that weights, tables and graphs are there, take as the budget what is really free."""
    if device.type == "cuda" and memory.pool_bytes is None:
        free = free_bytes(device)
        if leader is not None:
            free = min(free, leader.free_bytes())
        pool.resize(pool_room(device, memory, free, pool.created_bytes))


def _runner(
    share: Share, pool: MemoryPool, sampler: Sampler, limits: SchedulerConfig, leader: Leader | None
) -> ModelRunner | GroupRunner:
    runner = ModelRunner(
        share.model.decoder,
        pool.arena,
        pool.kv,
        share.model.facts.device,
        sampler.last_tokens,
        limits.largest_step,
        limits.max_num_seqs,
        share.ranks,
    )
    return runner if leader is None else leader.runner(runner, pool)


def _describe(
    config: EngineConfig, share: Share, max_model_len: int, num_chunks: int, load_s: float
) -> EngineInfo:
    facts, geometry = share.model.facts, share.geometry
    return EngineInfo(
        model_id=config.model.model_id,
        device=str(facts.device),
        dtype=str(facts.dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        vocab_size=facts.config.vocab_size,
        eos_token_ids=facts.config.eos_token_ids,
        pool_bytes=num_chunks * geometry.chunk_bytes,
        weight_bytes=share.model.weight_bytes,
        tokens_per_chunk=geometry.tokens_per_chunk,
        layers_per_group=geometry.layers_per_group,
        load_s=load_s,
        shared_device=shared_name(facts.device, config.memory),
    )


def _warm_up(pool: MemoryPool, runner: ModelRunner | GroupRunner, sampler: Sampler) -> None:
    """Run a prefill and a decode, so that no client waits for what happens once."""
    chain = TokenChain("", pool.kv.geometry.tokens_per_chunk)
    opened = pool.open_slot(None, chain, 3)
    if opened is None:
        return
    slot = opened.slot
    params = SamplingParams(max_tokens=2, top_p=0.9)
    for start, tokens in ((0, (0, 0)), (2, (0,))):
        if pool.reserve([(slot, start + len(tokens))], len(tokens), 1):
            piece = Piece("warm-up", slot, 0, start, tokens, samples=True)
            logits = runner.run(StepPlan(0, (piece,), num_decodes=int(len(tokens) == 1)))
            sampler.launch(logits, [SampleRow(0, params, 0, 0, ((0,), ()))]).wait()
    runner.synchronize()
    pool.close_slot(slot, chain, ())


def _capture_graphs(
    pool: MemoryPool,
    runner: ModelRunner | GroupRunner,
    shapes: Specs[GraphShape],
    device: torch.device,
    clock: Callable[[], float],
) -> None:
    """Record a step of every shape whose buffers the pool can back; the rest is launched kernel by kernel."""
    started = clock()
    fitting = [shape for shape in shapes if pool.fits_step(shape.tokens, shape.rows)]
    if not fitting or not all(pool.reserve([], shape.tokens, shape.rows) for shape in fitting):
        return
    progress = tqdm(fitting, desc="capturing CUDA graphs", unit="graph", disable=None)
    runner.capture(progress, cuda_graph_recorder(device))
    pool.keep_backed(max(shape.tokens for shape in fitting), max(shape.rows for shape in fitting))
    logger.info("captured %d CUDA graphs in %.1f s", len(fitting), clock() - started)
