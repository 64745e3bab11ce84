"""Who may import whom: the architecture, read from the sources; and that importing changes nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("vnet_core", "workers", "flows")

RANKS = (
    ("errors", "gpu_faults"),
    ("geometry", "volume", "sections", "plan", "blocks"),
    ("structures", "decide", "resample", "straighten"),
    (
        "preprocess",
        "bias",
        "augment",
        "deformation",
        "splits",
        "agreement",
        "challenge",
        "postprocess",
        "spread",
        "metrics",
        "surface",
        "statistics",
        "report",
        "slabs",
        "reporting",
        "plausibility",
        "drift",
        "colours",
        "pictures",
        "phantoms",
        "spheres",
        "contours",
        "networks",
        "losses",
        "fingerprint",
    ),
    ("training", "fitting", "inference", "ensemble", "portions", "planning"),
)
"""Modules of vnet_core; each imports only its own rank and those above it here."""

IMPURE = {
    "prefect", "ray", "dask", "distributed", "zarr", "fsspec",
    "os", "pathlib", "socket", "tempfile", "shutil", "subprocess", "time", "datetime", "random", "logging",
    "glob", "urllib", "http", "threading", "multiprocessing", "concurrent",
}  # fmt: skip
"""What vnet_core does without: engines, files, network, environment, clock, global randomness, threads."""

ORDER = {
    "workers": (
        "collector", "harmless", "markdown", "failpoints", "outputs", "storage", "identity", "ledger", "beside",
        "leases", "formats", "dicom", "sources", "cohort", "registry", "engines", "segmentation", "training", "nights",
        "reports", "settings", "care", "delivery", "ingest", "stretches", "preprocess", "evaluate",
    ),
    "flows": (
        "session", "plans", "server", "ui", "tasks", "stages", "reports", "reporting", "review", "pauses", "quarantine",
        "models", "training", "retraining", "nights", "cohorts", "schedules", "checks", "commands", "cli",
    ),
}  # fmt: skip
"""Folders and modules of a package; each imports only itself and those before it here."""

STAGES = ("ingest", "preprocess", "training.train", "segmentation.segment", "reports.report", "evaluate")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the three packages by its dotted name, parsed."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere, in functions and under TYPE_CHECKING too.

    ``from a import b`` is a.b where that is a module of ours, else a.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else str(node.module)


@cache
def imported(module: str) -> frozenset[str]:
    return frozenset(imports(modules()[module]))


def importers(package: str) -> set[str]:
    """Our modules that import ``package`` or anything in it."""
    return {name for name in modules() if any(within(target, package) for target in imported(name))}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def of(package: str) -> list[str]:
    return [name for name in modules() if within(name, package)]


def rank(module: str) -> int:
    part = module.split(".")[1]
    ranks = [number for number, parts in enumerate(RANKS) if part in parts]
    assert ranks, f"{module} has no rank; give it one in RANKS"
    return ranks[0]


# --- the walk itself


def test_the_walk_sees_imports_of_every_form():
    source = """
import a.b as c
from vnet_core import geometry, errors as e
def f():
    import ray
    from os import path
if TYPE_CHECKING:
    from torch import nn
"""
    assert set(imports(ast.parse(source))) == {"a.b", "vnet_core.geometry", "vnet_core.errors", "ray", "os", "torch"}
    assert {"vnet_core.errors", "workers.storage.store", "flows.cli", "vnet_core.networks.vnet"} <= set(modules())


def test_what_is_imported_of_ours_exists():
    missing = {
        (name, target)
        for name in modules()
        for target in imported(name)
        if any(within(target, package) for package in PACKAGES) and target not in modules()
    }
    assert not missing


# --- vnet_core


@pytest.mark.parametrize("module", of("vnet_core"))
def test_vnet_core_is_pure(module):
    for target in imported(module):
        assert not within(target, "workers"), module
        assert not within(target, "flows"), module
        assert target.partition(".")[0] not in IMPURE, f"{module} imports {target}"


@pytest.mark.parametrize("module", of("vnet_core"))
def test_vnet_core_opens_no_file_prints_nothing_and_leaves_global_randomness_alone(module):
    for node in ast.walk(modules()[module]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{module} line {node.lineno} calls {called}"
        assert called not in ("open", "print", "input", "exec", "eval", "io.open"), where
        assert called not in ("torch.manual_seed", "torch.seed", "torch.set_num_threads"), where
        assert called not in ("torch.load", "torch.save", "np.load", "np.save", "np.fromfile", "np.memmap"), where
        assert not called.endswith((".ReadImage", ".WriteImage", ".tofile")), where
        if called.rpartition(".")[0] == "np.random":
            assert called == "np.random.default_rng", where
        if called in ("torch.rand", "torch.randn", "torch.randint", "torch.randperm"):
            assert any(keyword.arg == "generator" for keyword in node.keywords), where


@pytest.mark.parametrize("module", [name for name in of("vnet_core") if "." in name])
def test_a_module_of_vnet_core_imports_only_its_own_rank_and_lower_ones(module):
    for target in imported(module):
        if within(target, "vnet_core"):
            assert rank(target) <= rank(module), f"{module} imports {target}"


def test_no_module_imports_itself_by_any_way():
    """Imports inside functions included."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"import cycle {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for target in sorted(imported(module) & set(modules())):
                visit(target, (*way, module))
            done.add(module)

    for module in [*of("vnet_core"), *of("workers"), *of("flows")]:
        visit(module, ())


# --- workers and flows


@pytest.mark.parametrize("module", [name for package in ORDER for name in of(package) if name != package])
def test_a_folder_of_workers_or_flows_imports_only_those_before_it(module):
    package, part = module.split(".")[:2]
    place = ORDER[package].index(part)
    for target in imported(module):
        if within(target, package) and target != package:
            assert ORDER[package].index(target.split(".")[1]) <= place, f"{module} imports {target}"


def test_workers_know_neither_prefect_nor_flows():
    for module in of("workers"):
        assert module not in importers("prefect")
        assert module not in importers("flows")


def test_prefect_is_in_flows_alone():
    assert importers("prefect")
    assert all(within(module, "flows") for module in importers("prefect"))


def test_zarr_is_in_two_modules():
    """Our own arrays, and foreign OME-Zarr scans."""
    assert importers("zarr") | importers("fsspec") == {"workers.storage.arrays", "workers.formats.ome_zarr"}


def test_dask_is_in_one_module():
    assert importers("dask") | importers("distributed") == {"workers.engines.dask_engine"}


def test_ray_is_in_few_modules():
    allowed = {
        "workers.segmentation.actors",
        "workers.engines.clusters",
        "workers.engines.ray_watch",
        "workers.training.train",
        "workers.training.losses",
        "workers.training.seats",
        "workers.training.validating",
    }
    assert importers("ray") == allowed


def test_scan_files_are_read_in_one_place():
    readers = ("workers.sources.scans", "workers.formats", "workers.dicom")
    for package in ("SimpleITK", "pydicom", "highdicom", "workers.formats"):
        outside = {m for m in importers(package) if not within(m, "vnet_core")}
        assert all(any(within(m, reader) for reader in readers) for m in outside), package


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reaches_no_other_stage(stage):
    """Not even through the modules that it uses, so that each can be run and replaced alone."""
    reached, waiting = set(), [f"workers.{stage}"]
    while waiting:
        for target in imported(waiting.pop()) & set(of("workers")):
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    others = {f"workers.{other}" for other in STAGES if other != stage}
    assert not reached & others


@pytest.mark.parametrize("folder", ["infra", "tests", "benchmarks", "examples", "docs"])
def test_what_is_around_the_program_is_imported_by_nothing_in_it(folder):
    assert not importers(folder)


# --- what importing does

IMPORT_ALL = """
import importlib, json, sys
theirs, ours = json.load(sys.stdin)
for statement in theirs:
    exec(statement, {})
import builtins, copy, locale, logging, os, random, signal, threading, warnings
import matplotlib, numpy, torch

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "import path": list(sys.path),
        "warning filters": [str(f) for f in warnings.filters],
        "random": random.getstate(),
        "numpy random": str(numpy.random.get_state()),
        "numpy errors": numpy.geterr(),
        "torch random": torch.random.get_rng_state().tolist(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch dtype": str(torch.get_default_dtype()),
        "torch gradients": torch.is_grad_enabled(),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch precision": torch.get_float32_matmul_precision(),
        "root handlers": [str(h) for h in logging.root.handlers],
        "root level": logging.root.level,
        "logging off": logging.root.manager.disable,
        "threads": sorted(t.name for t in threading.enumerate()),
        "signals": {s: str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)},
        "hooks": (str(sys.excepthook), str(sys.displayhook), str(threading.excepthook)),
        "matplotlib": {k: str(v) for k, v in matplotlib.rcParams.items() if k != "backend"},
        "locale": locale.setlocale(locale.LC_ALL),
    }

before = state()
for name in ours:
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"importing {name} changes {changed}"
print("done")
"""


def test_importing_our_modules_changes_nothing_but_their_being_imported():
    """What other libraries do when they are imported is theirs, so their imports run first."""
    theirs = {
        ast.unparse(statement)
        for tree in modules().values()
        for statement in tree.body
        if isinstance(statement, ast.Import | ast.ImportFrom)
        and not any(within(target, package) for target in imports(statement) for package in (*PACKAGES, "__future__"))
    }
    command = [sys.executable, "-c", IMPORT_ALL]
    names = json.dumps([sorted(theirs), sorted(modules())])
    result = subprocess.run(command, input=names, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "done\n", "importing prints"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("workers.storage.store", ["torch", "ray", "dask", "distributed", "prefect", "zarr", "SimpleITK", "numpy"]),
        ("vnet_core.preprocess", ["ray", "dask", "distributed", "prefect", "zarr", "matplotlib"]),
        ("workers.engines.clusters", ["torch", "ray", "dask", "distributed", "prefect"]),
        ("workers.engines.dask_engine", ["torch", "ray", "dask", "distributed", "prefect"]),
        ("flows.cohorts", ["torch", "ray", "dask", "distributed", "SimpleITK"]),
        ("flows.cli", ["torch", "ray", "dask", "distributed", "prefect", "zarr"]),
    ],
)
def test_a_module_brings_in_only_what_it_needs(module, absent):
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout == "[]\n"
