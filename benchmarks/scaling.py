"""Two segmenting workers beside one, and what the pool itself costs with many.

    python -m benchmarks.scaling --hardware NAME

Pairs: the same scans are segmented by one actor with one processor core and by two with one each, in turn, each first
as often as the other; models are loaded and one case done before the clock runs. The ratio is told for every pair.
Handing out: cases over which simulated actors sleep, threads of two processes of Ray; the cost is the processor time of
the process that hands out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch

from benchmarks.machine import RESULTS, provenance, tell
from tests.workers.simulated_actors import Simulated
from tests.workers.tiny_cohort import take_in
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.plan import Label, Plan
from vnet_core.sections import InferencePlan, NetworkPlan, PreprocessPlan
from vnet_core.volume import Volume
from workers.cohort import Case, load_entries
from workers.engines.clusters import Engines, processors, ray_session
from workers.preprocess import preprocess
from workers.registry.models import Model, Target, publish
from workers.segmentation.pool import SegmentPool
from workers.segmentation.segment import Job
from workers.sources.scans import write_volume
from workers.storage.store import Root

COHORT = "scaling"
PLAN = Plan(
    labels=(Label(value=1, name="organ"),),
    preprocess=PreprocessPlan(spacing_mm=(2.0, 2.0, 2.0)),
    network=NetworkPlan(),
    inference=InferencePlan(precision="float32"),
)
"""The network as published, whose passes take longer than reading and writing. What is read and written beside a pass
uses the second core of a machine that has one worker too, so a lighter network scales less."""


@dataclass(frozen=True)
class Handing:
    """What it took to hand cases out to simulated actors."""

    workers: int
    cases: int
    wall_s: float
    cpu_s: float

    @property
    def cpu_ms(self) -> float:
        """Processor time of the process that hands out, per case."""
        return 1000 * self.cpu_s / self.cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--width", type=int, default=PLAN.network.width, help="of the network")
    parser.add_argument("--cases", type=int, default=8, help="scans of a run")
    parser.add_argument("--side", type=int, default=64, help="voxels along an edge of a scan")
    parser.add_argument("--handed-out", type=int, default=10_000, help="cases over which simulated actors sleep")
    parser.add_argument("--hardware", default="this-machine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or RESULTS / f"scaling_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    with tempfile.TemporaryDirectory(prefix="vnet-scaling-") as name, ray_session(None, max(2, processors())):
        network = PLAN.network.model_copy(update={"width": options.width})
        plan = PLAN.model_copy(update={"network": network})
        root, model, cases = prepared(Path(name), plan, options.cases, options.side)
        found = pairs(root, model, cases, options.pairs)
        handed = [handing_out(root, model, workers, options.handed_out) for workers in (4, 64)]
    size = f"{options.cases} scans of {options.side}^3 voxels a run, a network of width {options.width}"
    tell(lines(found, handed, size), output)


def lines(found: Sequence[tuple[float, float]], handed: Sequence[Handing], size: str) -> list[str]:
    """The results file; ``found`` holds cases per minute by one worker and by two."""
    ratios = [two / one for one, two in found]
    rows = [
        f"| {number} | {one:.1f} | {two:.1f} | {two / one:.2f} |" for number, (one, two) in enumerate(found, start=1)
    ]
    costs = [f"| {h.workers} | {h.cases} | {h.wall_s:.1f} | {h.cpu_ms:.3f} |" for h in handed]
    return [
        "# Segmentation on one and on two workers, and the cost of handing cases out",
        "",
        f"{size}, one processor core for each worker.",
        "",
        "| pair | one worker, cases per minute | two workers, cases per minute | ratio |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"Ratio: median {statistics.median(ratios):.2f}, lowest {min(ratios):.2f}, highest {max(ratios):.2f}.",
        "",
        "| simulated actors | cases | seconds | processor time of the driver per case, ms |",
        "| --- | --- | --- | --- |",
        *costs,
        "",
        *provenance("ray", "torch"),
    ]


def prepared(folder: Path, plan: Plan, count: int, side: int) -> tuple[Root, Model, list[Case]]:
    """A root with a model and preprocessed scans."""
    (folder / "scans").mkdir()
    spec = PhantomSpec(seed=3, shape=(side, side, side), spacing_mm=(2.0, 2.0, 2.0), body_mm=0.75 * side)
    image, _ = phantom(spec)
    for number in range(count + 1):
        scan = Volume(image.voxels + image.voxels.dtype.type(number), image.geometry)
        write_volume(folder / "scans" / f"case{number:03d}.nii", scan)
    root = Root(folder / "root")
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    initialise(network, 0)
    model = publish(root, Target("scaling", "v1", plan), [safetensors.torch.save(network.state_dict())], {}, {})
    take_in(root, COHORT, [folder / "scans"])
    cases = [entry.case for entry in load_entries(root, COHORT)]
    with ThreadPoolExecutor(2) as executor:
        outcomes = preprocess(root, cases, plan, executor)
    assert all(outcome.done for outcome in outcomes), outcomes
    return root, model, cases


def pairs(root: Root, model: Model, cases: Sequence[Case], count: int) -> list[tuple[float, float]]:
    """Cases per minute by one worker and by two; who begins changes from pair to pair."""
    pools = {workers: SegmentPool(root, model, Engines(segment_workers=workers, segment_cpus=1)) for workers in (1, 2)}
    found = []
    for number in range(count):
        order = (1, 2) if number % 2 == 0 else (2, 1)
        rates = {workers: rate(pools[workers], f"run{number}-{workers}", cases) for workers in order}
        found.append((rates[1], rates[2]))
    return found


def rate(pool: SegmentPool, cohort: str, cases: Sequence[Case]) -> float:
    """Cases per minute; the actors are started for the run, so that none of another takes time of it."""
    # results of a cohort of its own, so that nothing is there yet; as many first ones as there are actors
    first = [Job(f"{cohort}-first-{n}", cases[0], "nifti") for n in range(2 * pool.engines.segment_workers)]
    for outcome in pool.run(first):
        assert outcome.state == "computed", outcome
    began = time.perf_counter()
    outcomes = pool.run([Job(cohort, case, "nifti") for case in cases[1:]])
    seconds = time.perf_counter() - began
    pool.close()
    assert [outcome.state for outcome in outcomes] == ["computed"] * len(outcomes), outcomes
    return 60 * len(outcomes) / seconds


def handing_out(root: Root, model: Model, workers: int, cases: int, seconds: float = 0.05) -> Handing:
    """Have simulated actors sleep so long over each of many cases."""
    engines = Engines(segment_workers=workers)
    actors = Simulated(engines, hosts=2, seconds=seconds)
    pool = SegmentPool(root, model, engines, actors)
    example = Case("example", ("/scans/example.nii",), digest="example")
    try:
        pool.run([Job("warm", replace(example, id=f"warm{n}"), "nifti") for n in range(2 * workers)])
        jobs = [Job("simulated", replace(example, id=f"case{n:05d}"), "nifti") for n in range(cases)]
        wall, cpu = time.perf_counter(), time.process_time()
        outcomes = pool.run(jobs)
        taken = Handing(workers, cases, time.perf_counter() - wall, time.process_time() - cpu)
    finally:
        pool.close()
        actors.close()
    assert len(outcomes) == cases
    return taken


if __name__ == "__main__":
    main()
