"""``vnet models describe``: a network's layers, cost and picture, from its name or a plan file."""

from __future__ import annotations

import tomllib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vnet_core.errors import ConfigError
from vnet_core.geometry import Shape
from vnet_core.plan import config_error
from vnet_core.sections import PRESETS, NetworkPlan
from workers.outputs import write_output

Table = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], str]


def describe(options: Namespace, table: Table) -> tuple[str, dict[str, Any]]:
    """Text and JSON of ``vnet models describe``; ``table`` lays out rows.

    Raises ConfigError ``network.unknown``, ``network.value``, ``network.input``, ``network.graph``, or
    ``output.unwritable`` when the picture cannot be written.
    """
    from vnet_core.networks.describe import describe as described

    plan = network_plan(options.model)
    for name, value in (("--channels", options.channels), ("--classes", options.classes), ("--input", options.input)):
        if min([value] if isinstance(value, int) else value) < 1:
            raise ConfigError("network.input", f"{name} is {value}; use 1 or more")
    z, y, x = options.input
    shape: Shape = (z, y, x)
    network = described(plan, options.channels, options.classes, shape)
    extra = network.as_json()
    rows = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "output": " x ".join(map(str, layer.shape)),
            "parameters": layer.parameters,
            "gmac": layer.macs / 1e9,
            "mib": layer.activation_bytes / 2**20,
        }
        for layer in network.layers
    ]

    def peaks(of: Mapping[str, int]) -> str:
        return ", ".join(f"{value / 2**30:.2f} GiB in {dtype}" for dtype, value in of.items())

    lines = [
        table(rows, ("layer", "kind", "output", "parameters", "gmac", "mib")),
        "",
        f"network          {options.model}, {options.channels} channels in, {options.classes} out",
        f"parameters       {network.parameters:,}",
        f"receptive field  {' '.join(map(str, network.receptive_field))} voxels, stage by stage",
        f"work             {network.macs / 1e9:.1f} GMAC for {z} x {y} x {x} voxels",
        f"one pass         {peaks(network.inference_bytes)}",
        f"training step    {peaks(network.training_bytes)}, with one sample of that size",
    ]
    if options.graph:
        _draw(network, options.model, options.graph)
        extra["graph"] = str(options.graph)
        lines.append(f"picture          {options.graph}")
    return "\n".join(lines), extra


def network_plan(source: str | None) -> NetworkPlan:
    """The network of a preset, or of the section ``[network]`` of a TOML file.

    Raises ConfigError ``network.unknown`` or ``network.value``.
    """
    if source in PRESETS:
        return NetworkPlan.model_validate({"preset": source})
    try:
        section = tomllib.loads(Path(source or "").read_text(encoding="utf-8")).get("network", {})
    except OSError:
        raise ConfigError(
            "network.unknown",
            f"{source!r} is neither a preset ({', '.join(PRESETS)}) nor a plan file that can be read",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("network.unknown", f"plan file {source} is not TOML: {error}") from None
    try:
        return NetworkPlan.model_validate(section)
    except ValidationError as error:
        raise config_error(error, NetworkPlan, "network") from None


def _draw(network: Any, title: str, path: Path) -> None:
    from vnet_core.networks.drawing import network_picture

    forms: dict[str, Literal["png", "svg"]] = {".png": "png", ".svg": "svg"}
    if path.suffix.lower() not in forms:
        raise ConfigError("network.graph", f"--graph {path} ends in {path.suffix!r}; use .png or .svg")
    write_output(path, network_picture(network, Path(title).stem, forms[path.suffix.lower()]))
