"""What a run gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.planner.figures import Recorder, Tally
from cluster.planner.fleet import Fleet
from cluster.planner.steering import Steering


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run that has ended.

    Attributes:
        tallies: by model id.
        duration_s: of virtual time.
    """

    tallies: Mapping[str, Tally]
    recorder: Recorder
    steering: Steering
    fleet: Fleet
    duration_s: float
