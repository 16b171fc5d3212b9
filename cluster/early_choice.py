"""Where an ingress finds the router of its own process, to have a request begun before Serve is asked.

A module of its own: Serve sends the router's by value, and what that holds would be another one's.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

from cluster.request_courier import Handover
from engine.messages import GenerateRequest


class EarlyChooser(Protocol):
    """`cluster.router.SloRouter`."""

    def begin_early(self, request: GenerateRequest, handover: Handover) -> bool:
        """Choose a group without asking Serve, and have it begin: the call, which goes to the same one, may
        come later. False, and nothing has happened, unless one with room is reached.
        """


_choosers: WeakValueDictionary[tuple[str, str], EarlyChooser] = WeakValueDictionary()


def register(application: str, deployment: str, chooser: EarlyChooser) -> None:
    """A router has been made. The last one of a deployment counts."""
    _choosers[application, deployment] = chooser


def begin_early(application: str, deployment: str, request: GenerateRequest, handover: Handover) -> bool:
    """See `EarlyChooser`; False if this process has no router for that deployment yet."""
    chooser = _choosers.get((application, deployment))
    return chooser is not None and chooser.begin_early(request, handover)
