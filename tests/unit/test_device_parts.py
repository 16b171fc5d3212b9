"""The part of a device that an engine starts with."""

from __future__ import annotations

import pytest
import torch

from engine.config import MIB, MemoryConfig
from engine.device import make_driver, shared_name, wait_for_part
from engine.simulated import VirtualClock

CPU = torch.device("cpu")


def test_a_cpu_pool_starts_with_its_part_and_may_grow_to_all() -> None:
    memory = MemoryConfig(pool_bytes=8 * MIB, device_share=0.25)
    vm, num_chunks = make_driver(CPU, MIB, memory)
    assert num_chunks == 8
    assert len(vm.create(40)) == 32
    vm.close()


def test_a_cpu_pool_without_a_size_is_a_part_of_the_default() -> None:
    (whole_vm, whole), (half_vm, half) = (
        make_driver(CPU, MIB, MemoryConfig(device_share=share)) for share in (1.0, 0.5)
    )
    assert half == whole / 2
    whole_vm.close()
    half_vm.close()


def test_only_a_shared_device_has_a_name() -> None:
    assert shared_name(CPU, MemoryConfig()) == ""
    assert shared_name(CPU, MemoryConfig(device_share=0.5)) == "cpu"


@pytest.mark.parametrize(("comes_back_s", "is_there"), [(0.0, True), (40.0, True), (1e9, False)])
def test_a_new_engine_waits_for_what_others_were_lent(comes_back_s: float, is_there: bool) -> None:
    clock = VirtualClock()
    found = wait_for_part(100, lambda: 100 if clock() >= comes_back_s else 60, clock, clock.advance)
    assert found is is_there
    assert clock() >= min(comes_back_s, 100)
    assert clock() < 150, "and not for ever"
