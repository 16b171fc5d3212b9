"""From a configuration to a running engine: the only place where its parts are wired together.

Sizes are decided here, once: how the KV fills chunks, how many chunks there are, and the longest
sequence they can hold.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Specs
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from engine.config import MIB, EngineConfig, MemoryConfig, SchedulerConfig
from engine.core import Engine
from engine.errors import ConfigError
from engine.footprint import Footprint
from engine.memory.arena import BufferSpec, activation_bytes
from engine.memory.balloon import Balloon
from engine.memory.blocks import TokenChain
from engine.memory.copies import Copies, ThreadCopies
from engine.memory.host_memory import available_bytes
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.kv_cache import KvGeometry
from engine.memory.pool import MemoryPool
from engine.memory.slabs import PinnedSlabs, PlainSlabs
from engine.memory.vmm import VirtualMemory
from engine.messages import EngineInfo, Piece, SamplingParams, StepPlan
from engine.model.buffers import activation_specs
from engine.model.graphs import GraphShape, cuda_graph_recorder, graph_shapes
from engine.model.loader import LoadedModel, ModelFacts, load_model, read_model
from engine.model.runner import ModelRunner
from engine.model.sampler import Sampler, SampleRow
from engine.model.warm_up import compile_kernels
from engine.outlet import Publish
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

_CPU_POOL_BYTES = 1024 * MIB
_CPU_CHUNK_BYTES = MIB // 2
_GPU_CHUNK_BYTES = 2 * MIB
_GRAPH_BYTES = 512 * MIB  # set aside until they are measured; 90 graphs of an 8B model hold 304 MiB (H100)
_SLOTS_PER_SEQUENCE = 4  # addresses only: finished conversations keep theirs while their KV is cached
_SMALLEST_PIECE = 16  # tokens; an elastic engine cuts a prompt this small before it gives up


def build_engine(
    config: EngineConfig, publish: Publish, clock: Callable[[], float] = time.monotonic
) -> Engine:
    """Load the model and make an engine that is ready to step, in the calling thread.

    Raises:
        ModelLoadError: the model is missing, damaged or not supported.
        ConfigError: the pool cannot hold one sequence, or a limit exceeds the model's.
    """
    started, limits = clock(), config.scheduler
    facts = read_model(config)
    footprint = Footprint(facts.device)
    geometry = _geometry(facts, config.memory)
    with ThreadPoolExecutor(1) as beside:
        compiled = beside.submit(compile_kernels, facts, geometry)
        model = load_model(config, facts)
        compiled.result()
    specs = activation_specs(facts.config, facts.dtype, facts.kernels)
    eos_token_ids = facts.config.eos_token_ids
    sampler = Sampler(
        facts.config.vocab_size, eos_token_ids, facts.device, limits.max_num_seqs, facts.kernels
    )
    shapes = _graph_shapes(config, model)
    vm, total = make_driver(facts.device, geometry.chunk_bytes, config.memory, _GRAPH_BYTES if shapes else 0)
    max_model_len = _fit_model_len(config, facts.config.max_context, geometry, specs, total)
    pool = _make_pool(config, facts, vm, total, geometry, specs, max_model_len, shapes)
    _add_balloon(pool, config.memory, facts.device, vm)
    scheduler = Scheduler(limits, pool, max_model_len, eos_token_ids, clock)
    runner = _runner(model, pool, sampler, limits)
    _warm_up(pool, runner, sampler)
    graph_bytes = footprint.bytes_of(
        lambda: _capture_graphs(pool, runner, shapes, facts.device, clock), lambda: pool.created_bytes
    )
    _settle_budget(pool, config.memory, facts.device)
    footprint.started(model.weight_bytes, graph_bytes, pool.created_bytes)
    pool_bytes = pool.chunks.total * geometry.chunk_bytes
    info = _describe(config, model, geometry, max_model_len, pool_bytes, clock() - started)
    steps_ahead = 1 if facts.device.type == "cuda" else 0
    return Engine(config, info, pool, scheduler, runner, sampler, publish, clock, steps_ahead, footprint)


def _make_pool(
    config: EngineConfig,
    facts: ModelFacts,
    vm: VirtualMemory,
    total: int,
    geometry: KvGeometry,
    specs: Specs[BufferSpec],
    max_model_len: int,
    shapes: Specs[GraphShape],
) -> MemoryPool:
    memory, limits = config.memory, config.scheduler
    return MemoryPool(
        vm,
        total,
        memory.mode,
        geometry,
        specs,
        limits.max_num_seqs,
        max_model_len,
        limits.largest_step,
        facts.dtype,
        [shape.decodes for shape in reversed(shapes) if not shape.pieces],
        limits.max_num_seqs * (_SLOTS_PER_SEQUENCE if memory.enable_prefix_caching else 1),
        memory.enable_prefix_caching,
    )


def _add_balloon(pool: MemoryPool, memory: MemoryConfig, device: torch.device, vm: VirtualMemory) -> None:
    """Let sequences be parked in host memory, unless that is switched off, or every slot keeps its memory."""
    on_gpu = device.type == "cuda"
    nbytes = memory.balloon_bytes
    if nbytes is None:
        nbytes = int(available_bytes() * memory.balloon_share) if on_gpu else 0
    num_chunks = nbytes // vm.chunk_bytes
    if memory.mode == "static" or not num_chunks:
        return
    copies: Copies
    if on_gpu:
        from engine.memory.cuda_copies import CudaCopies  # as for the driver

        copies = CudaCopies(device, vm.chunk_bytes)
    else:
        copies = ThreadCopies(vm.chunk_bytes)
    balloon = Balloon(
        PinnedSlabs(device) if on_gpu else PlainSlabs(),
        vm.chunk_bytes,
        num_chunks,
        min(num_chunks, max(1, memory.balloon_slab_bytes // vm.chunk_bytes)),
        is_filled=on_gpu and memory.balloon_bytes is not None,
    )
    pool.add_balloon(balloon, copies)


def _settle_budget(pool: MemoryPool, memory: MemoryConfig, device: torch.device) -> None:
    """Now that weights, tables and graphs are there, take as the budget what is really free."""
    if device.type == "cuda" and memory.pool_bytes is None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        pool.resize(pool.created_bytes + free - memory.margin_bytes)


def _runner(model: LoadedModel, pool: MemoryPool, sampler: Sampler, limits: SchedulerConfig) -> ModelRunner:
    return ModelRunner(
        model.decoder,
        pool.arena,
        pool.kv,
        model.facts.device,
        sampler.last_tokens,
        limits.largest_step,
        limits.max_num_seqs,
    )


def _graph_shapes(config: EngineConfig, model: LoadedModel) -> list[GraphShape]:
    if model.facts.device.type != "cuda" or config.enforce_eager:
        return []
    limits, num_weights = config.scheduler, model.weight_bytes / model.facts.dtype.itemsize
    return graph_shapes(limits.max_num_seqs, limits.max_num_batched_tokens, num_weights)


def _describe(
    config: EngineConfig,
    model: LoadedModel,
    geometry: KvGeometry,
    max_model_len: int,
    pool_bytes: int,
    load_s: float,
) -> EngineInfo:
    return EngineInfo(
        model_id=config.model.model_id,
        device=str(model.facts.device),
        dtype=str(model.facts.dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        vocab_size=model.facts.config.vocab_size,
        eos_token_ids=model.facts.config.eos_token_ids,
        pool_bytes=pool_bytes,
        weight_bytes=model.weight_bytes,
        tokens_per_chunk=geometry.tokens_per_chunk,
        layers_per_group=geometry.layers_per_group,
        load_s=load_s,
    )


def _warm_up(pool: MemoryPool, runner: ModelRunner, sampler: Sampler) -> None:
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
    runner: ModelRunner,
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


def make_driver(
    device: torch.device, chunk_bytes: int, memory: MemoryConfig, graph_bytes: int = 0
) -> tuple[VirtualMemory, int]:
    """The device's driver, and the pool's budget in chunks.

    On a GPU the budget is what is free now, after the weights, less a stated margin: no fraction of
    the card is guessed, and another process on it is simply not counted.

    Args:
        graph_bytes: what CUDA graphs may take afterwards; measured once they are there.
    """
    if device.type == "cuda":
        from engine.memory.cuda_vmm import CudaVirtualMemory  # a CPU machine may lack the CUDA driver

        gc.collect()  # an engine that was dropped may still have its memory
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        nbytes = memory.pool_bytes or free - memory.margin_bytes - graph_bytes
        if nbytes > free:
            raise ConfigError(
                f"memory.pool_bytes is {nbytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on "
                f"{device} after the weights: lower it, or leave it out to have it measured"
            )
        return CudaVirtualMemory(device, chunk_bytes, memory.margin_bytes), max(0, nbytes) // chunk_bytes
    nbytes = memory.pool_bytes or _CPU_POOL_BYTES
    if nbytes > available_bytes():
        raise ConfigError(
            f"the pool wants {nbytes / 2**30:.1f} GiB, and {available_bytes() / 2**30:.1f} GiB of memory are "
            "available: lower memory.pool_bytes"
        )
    return HostVirtualMemory(chunk_bytes, nbytes // chunk_bytes), nbytes // chunk_bytes


def _geometry(facts: ModelFacts, memory: MemoryConfig) -> KvGeometry:
    on_gpu = facts.device.type == "cuda"
    return KvGeometry.choose(
        facts.config.num_layers,
        facts.config.num_kv_heads,
        facts.config.head_dim,
        facts.dtype.itemsize,
        memory.chunk_bytes or (_GPU_CHUNK_BYTES if on_gpu else _CPU_CHUNK_BYTES),
        memory.layers_per_group,
        min_tokens=128 if on_gpu else 64,  # no tiles on a CPU; smaller chunks waste less
    )


def _fit_model_len(
    config: EngineConfig, model_limit: int, geometry: KvGeometry, specs: Specs[BufferSpec], total: int
) -> int:
    """The longest sequence: what was asked for if it fits, else as long as model and pool allow."""
    limits = config.scheduler
    step = (limits.largest_step, limits.max_num_seqs)
    if config.memory.mode == "elastic":
        step = (_SMALLEST_PIECE, 1)
    activations = max(1, -(-activation_bytes(specs, *step) // geometry.chunk_bytes))
    left = total - 1 - activations  # one is the guard
    fits = max(0, left) // geometry.num_groups * geometry.tokens_per_chunk
    asked = config.max_model_len
    if asked is not None and asked > model_limit:
        raise ConfigError(f"max_model_len is {asked}, and the model was made for {model_limit}: lower it")
    if fits < min(asked or _SMALLEST_PIECE, model_limit):
        least = geometry.chunks_for(asked or _SMALLEST_PIECE) + 1 + activations
        raise ConfigError(
            f"a pool of {total} chunks of {geometry.chunk_bytes >> 10} KiB holds a sequence of {fits} tokens "
            f"beside the activations, and {asked or _SMALLEST_PIECE} are needed: set memory.pool_bytes to at "
            f"least {least * geometry.chunk_bytes} or lower max_model_len"
        )
    if asked is None and fits < model_limit:
        logger.warning("max_model_len is %d: the model allows %d, the pool no more", fits, model_limit)
    return asked or min(model_limit, fits)
