"""A cohort of tiny volumes with a bright ball each, ready to be trained on."""

from __future__ import annotations

from collections import Counter

import numpy as np

from vnet_core import geometry as geo
from vnet_core.fingerprint import Fingerprint
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from workers.cohort import Case, Entry, Verdict, volume_key
from workers.storage.arrays import write_arrays
from workers.storage.store import Root

GRID = Geometry((12, 12, 12), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((0, 0, 1), (0, 1, 0), (1, 0, 0)))
LABEL = 2


def ball_plan(**training) -> Plan:
    """A network that steps in milliseconds."""
    return Plan.from_mapping(
        {
            "labels": [{"value": LABEL, "name": "ball"}],
            "preprocess": {"spacing_mm": [2.0, 1.0, 1.0]},
            "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1], "normalisation": "instance"},
            "training": {"patch_size": [8, 8, 8], "batch_size": 3, "precision": "float32", **training},
            "inference": {"precision": "float32"},
        }
    )


def ball_entries(root: Root, plan: Plan, names: str = "abcd") -> list[Entry]:
    """Preprocessed cases of one letter each."""
    generator = np.random.default_rng(0)
    z, y, x = np.indices(GRID.shape)
    entries = []
    for name in names:
        centre = generator.uniform(4, 8, 3)
        ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 9
        image = (generator.standard_normal(GRID.shape) + 3 * ball).astype(np.float32)
        case = Case(name, (f"{name}.nii",), f"{name}-label.nii", name, f"bytes of {name}", "label bytes", GRID)
        key = volume_key(case, plan)
        label = np.where(ball, LABEL, 0).astype(np.uint8)
        write_arrays(root, key, {"image": image[None], "label": label}, {"geometry": geo.to_mapping(GRID)})
        digests = {"case_digest": case.digest, "label_digest": case.label_digest}
        root.seal(key, {"stage": "preprocess", "geometry": geo.to_mapping(GRID), **digests})
        voxels = Counter({0: int((~ball).sum()), LABEL: int(ball.sum())})
        found = Fingerprint(label_voxels=voxels, label_cases=Counter({0: 1, LABEL: 1}))
        entries.append(Entry(case, Verdict("accepted"), found))
    return entries
