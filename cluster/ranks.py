"""The actors that hold one copy of a model: the engine's, and one for each further rank.

They live and die together: a rank that is gone leaves the others waiting in a sum that never ends, so whoever
has made them watches them, and kills all when one has ended.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.actor import RankActor
from engine.config import EngineConfig
from engine.tp.place import RankPlace

ENGINE_BUNDLE = 1  # bundle 0 of the placement group holds the replica itself; further ranks come behind


class Ranks:
    """Starts the actors of one TP group, each in its bundle of the replica's placement group.

    Args:
        config: of the engine.
        engine_class: of the first rank: a plain class shaped like `engine.actor.EngineActor`.
        resources: what a bundle reserves, such as `{"CPU": 1, "GPU": 1}`.
        max_concurrency: calls the engine actor takes at once.

    Attributes:
        engine: the first rank's actor.
    """

    def __init__(
        self, config: EngineConfig, engine_class: type, resources: Mapping[str, float], max_concurrency: int
    ) -> None:
        size = config.tensor_parallel_size
        # Of this node: the group is packed on one. Open to nobody else.
        self._directory = tempfile.mkdtemp(prefix="ballonet-ranks-") if size > 1 else None
        self._others: list[Any] = []
        if self._directory is None:
            self.engine: Any = _bundle(engine_class, resources, 0, max_concurrency).remote(config)
            self._following: list[Any] = []
            return
        places = [RankPlace(rank, size, self._directory) for rank in range(size)]
        self.engine = _bundle(engine_class, resources, 0, max_concurrency).remote(config, places[0])
        self._others = [
            _bundle(RankActor, resources, place.rank, 1).remote(config, place) for place in places[1:]
        ]
        self._following = [actor.follow.remote() for actor in self._others]

    async def ended(self) -> str:
        """Why a rank beside the engine's has ended, once one has; never returns if there are none."""
        if not self._following:
            await asyncio.Event().wait()
        waiting = [asyncio.ensure_future(_reason(one)) for one in self._following]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        rank = waiting.index(done.pop()) + 1
        return f"rank {rank} of {len(waiting) + 1} {waiting[rank - 1].result()}"

    def kill(self) -> None:
        """End all of them, now."""
        for actor in (self.engine, *self._others):
            ray.kill(actor)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


async def _reason(following: Any) -> str:
    try:
        await following
    except (RayActorError, RayTaskError) as error:
        return f"ended: {first_line(error.cause if isinstance(error, RayTaskError) else error)}"
    return "ended with the first one"


def engine_name(group_id: str) -> str:
    """The actor of the engine of a group of the same model as this one's."""
    replica = serve.get_replica_context()
    return _name(replica.app_name, replica.deployment, group_id, 0)


def _name(app: str, deployment: str, group_id: str, rank: int) -> str:
    return f"{app}:{deployment}:{group_id}:rank{rank}"


def _bundle(kind: type, resources: Mapping[str, float], rank: int, max_concurrency: int) -> Any:
    """An actor class, bound to the rank's bundle and to a name that tells whose it is."""
    replica = serve.get_replica_context()
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return ray.remote(kind).options(
        name=_name(replica.app_name, replica.deployment, replica.replica_tag, rank),
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        resources=others or None,
        max_concurrency=max_concurrency,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            get_current_placement_group(), placement_group_bundle_index=ENGINE_BUNDLE + rank
        ),
    )


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    return next(iter(str(error).splitlines()), type(error).__name__)
