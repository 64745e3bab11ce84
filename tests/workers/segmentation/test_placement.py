"""What an actor asks for."""

from dataclasses import replace

import pytest

from tests.workers.known_model import known_plan
from vnet_core.ensemble import held_bytes, number_of_passes
from vnet_core.geometry import Geometry
from vnet_core.inference import computed_shape
from vnet_core.networks.memory import predicted_peak_bytes
from workers.segmentation.placement import PROCESS_BYTES, memory_to_ask, needed_bytes

GRID = Geometry((20, 40, 60), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0))
PLAN = known_plan((1.0, 1.0, 1.0))


def test_a_pass_on_the_grid_of_the_plan_in_float32():
    expected = predicted_peak_bytes(PLAN.network, 1, 3, (40, 40, 60), 4)
    assert needed_bytes(PLAN, 1, GRID, on_gpu=False) == PROCESS_BYTES + expected
    # the grid of the network, however the scan's axes lie
    turned = replace(GRID, shape=(60, 20, 40), spacing_mm=(1.0, 2.0, 1.0))
    assert needed_bytes(PLAN, 1, turned, on_gpu=False) == pytest.approx(PROCESS_BYTES + expected, rel=0.02)


def test_a_pass_takes_no_more_than_the_plan_allows():
    small = known_plan((1.0, 1.0, 1.0), memory_limit_gib=0.001)
    assert needed_bytes(small, 1, GRID, on_gpu=False) == PROCESS_BYTES + int(0.001 * 2**30)


def test_several_passes_hold_sum_and_classes_beside():
    voxels = 40 * 40 * 60
    one, three = (needed_bytes(PLAN, networks, GRID, on_gpu=False) for networks in (1, 3))
    assert three - one == voxels * (3 * 4 + 3)
    assert needed_bytes(PLAN, 3, GRID, on_gpu=True) == PROCESS_BYTES + voxels * (3 * 4 + 3)


def test_a_case_that_goes_through_in_portions_asks_for_the_limit():
    limit = int(PLAN.inference.memory_limit_gib * 2**30)
    body = replace(GRID, shape=(1200, 800, 800), spacing_mm=(1.0, 1.0, 1.0))
    for on_gpu in (False, True):
        assert needed_bytes(PLAN, 3, body, on_gpu) == PROCESS_BYTES + limit


@pytest.mark.parametrize("axes", [(), (0,), (0, 1, 2)])
def test_it_says_what_the_actor_says(axes):
    plan = known_plan((5.0, 5.0, 20.0), mirror_axes=axes)
    shape = computed_shape(plan, (8, 8, 3))
    assert shape == (8, 8, 8), "no smaller than a patch"
    peak = predicted_peak_bytes(plan.network, 1, 3, shape, 4)
    held = held_bytes(plan, shape, number_of_passes(2, plan))
    assert needed_bytes(plan, 2, GRID, on_gpu=False) == PROCESS_BYTES + peak + held


def test_the_largest_that_fits_a_node_is_asked_for():
    assert memory_to_ask([3, 7, 5], largest=8) == 7
    assert memory_to_ask([3, 7, 5], largest=6) == 5
    assert memory_to_ask([3, 7, 5], largest=2) == 3, "what not even the smallest can have is told"
