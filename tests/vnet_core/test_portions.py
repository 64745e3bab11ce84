"""A mask made portion by portion is the mask made whole, in whatever order; and what it takes is foretold."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vnet_core.blocks import Region
from vnet_core.decide import decision
from vnet_core.ensemble import decide_on_grid, number_of_passes, predict
from vnet_core.errors import MemoryLimitError
from vnet_core.geometry import Geometry, matrix_of, resampled, to_canonical
from vnet_core.inference import choose_tile, computed_shape, predict_logits, prepare, region_logits
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan
from vnet_core.portions import EDGE, Portions, divided, segment_portion, smaller_tile, tile_of_portions, whole_bytes
from vnet_core.preprocess import restore

CPU = torch.device("cpu")
LABELS = [{"value": 1, "name": "one"}, {"value": 4, "name": "four"}]


def plan_of(patch=(8, 8, 8), labels=LABELS, **sections) -> Plan:
    """Instance normalisation, so that what is larger than twice the patch goes through in tiles of the patch."""
    return Plan.from_mapping(
        {
            "labels": labels,
            "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1], "normalisation": "instance"},
            "training": {"patch_size": list(patch)},
            "inference": {"precision": "float32", **sections.pop("inference", {})},
            **sections,
        }
    )


def networks_of(plan: Plan, count: int = 1) -> list:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(prepare(build_vnet(plan.network, len(plan.channels), plan.outputs), CPU, torch.float32))
    return made


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def reader(whole: torch.Tensor):
    return lambda region: whole[(slice(None), *region.slices)]


def small_portions(plan: Plan, network: Geometry, scan: Geometry, edges, count: int = 1) -> Portions:
    tile = tile_of_portions(plan, network.shape, 4)
    portions = divided(plan, (network, scan), tile, number_of_passes(count, plan), 4, 2**32)
    return replace(portions, edges=edges)


def assembled(networks, whole: torch.Tensor, portions: Portions, backwards: bool = False) -> np.ndarray:
    result = np.full(portions.scan_shape, 255, np.uint8)
    for portion in portions.regions()[:: -1 if backwards else 1]:
        assert (result[portion.slices] == 255).all()
        result[portion.slices] = segment_portion(networks, reader(whole), portions, portion).classes
    return result


@pytest.mark.parametrize("shape", [(20, 9, 31), (5, 30, 17), (8, 8, 17)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_logits_of_a_region_are_those_of_the_whole_to_the_last_bit(shape, overlap):
    plan = plan_of(inference={"overlap": overlap})
    (network,) = networks_of(plan)
    whole = image(1, *shape)
    logits = predict_logits(network, whole, plan)
    tile = choose_tile(plan, computed_shape(plan, shape), 4)
    assert tile == (8, 8, 8)
    corner = tuple(n // 3 for n in shape)
    for region in (Region((0, 0, 0), shape), Region(corner, shape), Region(corner, tuple(n + 1 for n in corner))):
        part = region_logits(network, reader(whole), plan, shape, tile, region)
        assert torch.equal(part, logits[(slice(None), *region.slices)])


DIRECTIONS = {
    "canonical": [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    "sagittal": [[1, 0, 0], [0, 0, -1], [0, -1, 0]],
    "oblique": Rotation.from_euler("zyx", [20, -35, 28], degrees=True).as_matrix(),
}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.7, 0.8, 2.3)], ids=["same-spacing", "other-spacing"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_portions_together_are_the_mask_of_the_whole(direction, spacing):
    plan = plan_of(labels=[{"value": v, "name": str(v)} for v in range(1, 6)])
    networks = networks_of(plan)
    scan = Geometry((26, 19, 23), (1.0, 1.0, 1.0), (3.0, -4.0, 5.0), matrix_of(DIRECTIONS[direction]))
    _, canonical = to_canonical(scan)
    # cropped, as preprocessing does, so that a border of the scan is outside
    inner = replace(canonical, shape=tuple(n - 3 for n in canonical.shape))
    network = resampled(inner, spacing)
    whole = image(1, *network.shape)
    expected = restore(predict(networks, whole, plan).logits, network, scan, decision(plan))
    assert 0.1 < (expected > 0).mean() < 0.95
    for edges in ((7, 8, 9), (26, 5, 23)):
        portions = small_portions(plan, network, scan, edges)
        np.testing.assert_array_equal(assembled(networks, whole, portions), expected)
    np.testing.assert_array_equal(assembled(networks, whole, portions, backwards=True), expected)


@pytest.mark.parametrize(
    "sections",
    [
        {"inference": {"mirror_axes": [0, 2]}},
        {"head": "sigmoid", "inference": {"mirror_axes": [1]}},
    ],
    ids=["mirrors", "sigmoid"],
)
def test_several_passes_are_meant_and_each_is_told_alone(sections):
    plan = plan_of(**sections)
    networks = networks_of(plan, 2)
    scan = Geometry((21, 18, 25), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    network = resampled(scan, (0.8, 1.3, 1.0))
    whole = image(1, *network.shape)
    said = predict(networks, whole, plan)
    expected = restore(said.logits, network, scan, decision(plan))
    portions = small_portions(plan, network, scan, (9, 18, 10), len(networks))
    mean = np.full(network.shape, 255, np.uint8)
    alone = [mean.copy() for _ in said.passes]
    for portion in portions.regions():
        found = segment_portion(networks, reader(whole), portions, portion)
        np.testing.assert_array_equal(found.classes, expected[portion.slices])
        assert (mean[found.own.slices] == 255).all(), "a voxel belongs to one portion"
        mean[found.own.slices] = found.mean
        for whole_map, part in zip(alone, found.alone, strict=True):
            whole_map[found.own.slices] = part
    np.testing.assert_array_equal(mean, decide_on_grid(said.logits, plan))
    np.testing.assert_array_equal(alone, said.passes)


def test_a_volume_smaller_than_the_patch_along_an_axis_is_surrounded_by_zeros():
    plan = plan_of(patch=(16, 8, 8))
    networks = networks_of(plan)
    scan = Geometry((5, 40, 30), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    whole = image(1, *scan.shape)
    expected = restore(predict(networks, whole, plan).logits, scan, scan, decision(plan))
    np.testing.assert_array_equal(assembled(networks, whole, small_portions(plan, scan, scan, (5, 16, 16))), expected)


# --- how a scan is divided


def large(limit_gib: float, labels: int = 8, shape=(256, 256, 256), patch: int = 32) -> tuple[Plan, Geometry]:
    plan = plan_of(
        (patch,) * 3,
        [{"value": v, "name": str(v)} for v in range(1, labels + 1)],
        inference={"memory_limit_gib": limit_gib},
    )
    return plan, Geometry(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def test_portions_cover_the_scan_once_in_multiples_of_a_chunk_within_the_limit():
    plan, grid = large(1.0)
    portions = divided(plan, (grid, grid), tile_of_portions(plan, grid.shape, 4), 1, 4, 2**30)
    assert sum(prod(portion.shape) for portion in portions.regions()) == prod(grid.shape)
    assert all(edge % EDGE == 0 for edge in portions.edges)
    assert 0.5 * 2**30 < portions.peak_bytes <= 2**30
    roomier, _ = large(2.0)
    tile = tile_of_portions(roomier, grid.shape, 4)
    assert len(divided(roomier, (grid, grid), tile, 1, 4, 2**31).regions()) < len(portions.regions())


def test_a_limit_below_the_smallest_portion_is_refused_with_both_numbers():
    plan, grid = large(1.0, labels=3000)
    with pytest.raises(
        MemoryLimitError, match=r"smallest portion .* needs \d+\.\d\d GiB, 1\.00 GiB are allowed"
    ) as caught:
        divided(plan, (grid, grid), (32, 32, 32), 1, 4, 2**30)
    assert caught.value.code == "memory.portion"


def test_the_patch_is_the_tile_where_bands_would_leave_less():
    plan, grid = large(3.0, labels=100, shape=(800, 512, 512), patch=64)
    assert max(choose_tile(plan, grid.shape, 2)) < 64
    assert tile_of_portions(plan, grid.shape, 2) == (64, 64, 64)
    ordinary, small = large(3.0, shape=(96, 96, 96))
    assert tile_of_portions(ordinary, small.shape, 2) == choose_tile(ordinary, small.shape, 2) == (32, 32, 32)


def test_a_hundred_labels_on_a_body_scan_are_84_gb_whole_and_4_gib_in_portions():
    plan, grid = large(3.0, labels=100, shape=(800, 512, 512), patch=64)
    assert whole_bytes(plan, grid.shape, grid.shape, 1) > 84e9
    portions = divided(plan, (grid, grid), tile_of_portions(plan, grid.shape, 2), 1, 2, 3 * 2**30)
    assert portions.peak_bytes <= 3 * 2**30


def test_a_smaller_tile_has_half_the_edges_until_two_divisors():
    assert smaller_tile((64, 40, 9), 4) == (32, 20, 8)
    assert smaller_tile((8, 8, 3), 4) is None


def test_an_ordinary_case_in_tiles_is_far_below_the_default_limit():
    """A CT of 300 slices, three outputs, at its own spacing: its logits take 0.9 GiB, its mask 0.8."""
    plan, grid = large(6.0, labels=2, shape=(300, 512, 512), patch=64)
    assert choose_tile(plan, grid.shape, 4) is not None
    assert 2 * 2**30 < whole_bytes(plan, grid.shape, grid.shape, 1) < 3 * 2**30
