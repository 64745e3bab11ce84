"""Public data sets that ``vnet fetch`` knows: where they lie, what proves them, and what to type next.

The checksums of the Medical Segmentation Decathlon are those that MONAI's ``DecathlonDataset`` publishes
(``monai/apps/datasets.py``); that of PROMISE12 is the one in torch-em (``datasets/medical/promise12.py``). No public
source beside the host itself was found for the files of LUNA16, so none is claimed for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Remote:
    """One file of a data set."""

    url: str
    checksum: str | None = None
    """``md5:...`` or ``sha256:...``; None: no checksum is known, and the digest found is shown."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A public data set."""

    title: str
    files: tuple[Remote, ...]
    licence: str
    homepage: str
    layout: str
    """What lies in the folder afterwards."""
    folder: str
    """Where it is put when nothing else is said; parts of one collection share a folder."""
    following: tuple[str, ...]
    """The commands to type next; ``{output}`` is the folder that the data lie in, ``{path}`` the first file's own."""


def _decathlon(task: str, md5: str, title: str, *following: str) -> Dataset:
    url = f"https://msd-for-monai.s3-us-west-2.amazonaws.com/{task}.tar"
    return Dataset(
        f"Medical Segmentation Decathlon, {title}",
        (Remote(url, f"md5:{md5}"),),
        "CC-BY-SA 4.0",
        "http://medicaldecathlon.com",
        f"{task}/imagesTr, labelsTr, imagesTs and dataset.json",
        "data/msd",
        following,
    )


def _derived(task: str, md5: str, title: str) -> Dataset:
    """A task without a recipe of its own: everything is derived from the cohort."""
    cohort = task.partition("_")[2].lower()
    return _decathlon(
        task,
        md5,
        title,
        f"vnet ingest {{output}}/{task} --cohort {cohort}",
        f"vnet train --cohort {cohort} --model {cohort} --minutes 60",
    )


def _luna_part(number: int) -> Remote:
    """Of the ten parts the first seven lie in one record, the others in a second."""
    record = 3723295 if number < 7 else 4121926
    return Remote(f"https://zenodo.org/records/{record}/files/subset{number}.zip")


_LUNA = "https://zenodo.org/records/3723295/files"
_LUNA_NEXT = (
    "vnet ingest {output} --cohort lungs --channel CT --label 3=lung-3 --label 4=lung-4 --label 5=trachea",
    "vnet train --cohort lungs --model lungs --plan examples/lungs.toml --minutes 60",
    "vnet label spheres {output} --annotations {output}/annotations.csv --hu-min -600"
    " --inside {output}/seg-lungs-LUNA16 --output {output}-nodules",
    "vnet ingest {output}-nodules/manifest.csv --cohort nodules --channel CT --label 1=nodule --label 255=undecided",
    "vnet train --cohort nodules --model nodules --plan examples/nodules.toml --minutes 60",
)
_LUNA_LICENCE = "CC-BY 4.0 (LUNA16), CC-BY 3.0 (LIDC-IDRI)"
_LUNA_HOME = "https://luna16.grand-challenge.org"

CATALOGUE: Mapping[str, Dataset] = MappingProxyType(
    {
        "msd-hippocampus": _decathlon(
            "Task04_Hippocampus",
            "9d24dba78a72977dbd1d2e110310f31b",
            "task 4: hippocampus, MR, 260 labelled and 130 unlabelled scans",
            "vnet ingest {output}/Task04_Hippocampus --cohort hippocampus",
            "vnet train --cohort hippocampus --model hippocampus --plan examples/hippocampus.toml --minutes 10",
            "vnet segment {output}/Task04_Hippocampus/imagesTs --model hippocampus --output masks",
        ),
        "msd-brain-tumour": _derived(
            "Task01_BrainTumour",
            "240a19d752f0d9e9101544901065d872",
            "task 1: glioma in four channels, MR, 484 labelled and 266 unlabelled scans",
        ),
        "msd-heart": _derived("Task02_Heart", "06ee59366e1e5124267b774dbd654057", "task 2: left atrium, MR"),
        "msd-liver": _derived("Task03_Liver", "a90ec6c4aa7f6a3d087205e23d4e6397", "task 3: liver and tumour, CT"),
        "msd-prostate": _decathlon(
            "Task05_Prostate",
            "35138f08b1efaef89d7424d2bcc928db",
            "task 5: zones of the prostate in two channels, MR, 32 labelled and 16 unlabelled scans",
            "vnet ingest {output}/Task05_Prostate --cohort prostate-zones",
            "vnet train --cohort prostate-zones --model prostate-zones --minutes 60",
        ),
        "msd-lung": _derived("Task06_Lung", "8afd997733c7fc0432f71255ba4e52dc", "task 6: lung tumour, CT"),
        "msd-pancreas": _derived(
            "Task07_Pancreas", "4f7080cfca169fa8066d17ce6eb061e4", "task 7: pancreas and tumour, CT"
        ),
        "msd-hepatic-vessel": _derived(
            "Task08_HepaticVessel", "641d79e80ec66453921d997fbf12a29c", "task 8: hepatic vessels and tumour, CT"
        ),
        "msd-spleen": _derived("Task09_Spleen", "410d4a301da4e5b2f6f86ec3ddba524e", "task 9: spleen, CT"),
        "msd-colon": _derived("Task10_Colon", "bad7a188931dc2f6acf72b08eb6202d0", "task 10: colon cancer, CT"),
        "promise12": Dataset(
            "PROMISE12: prostate, T2-weighted MR, 50 labelled scans",
            (
                Remote(
                    "https://zenodo.org/records/8026660/files/training_data.zip",
                    "sha256:150287d0c74cd0105d8b70b43af4a7bf4f1fd3e1748829779177a0ccaf948f45",
                ),
            ),
            "see the homepage",
            "https://promise12.grand-challenge.org",
            "training_data/CaseXX.mhd with CaseXX_segmentation.mhd beside it",
            "data/promise12",
            (
                "vnet ingest {output}/training_data --cohort prostate --channel T2 --label 1=prostate",
                "vnet train --cohort prostate --model prostate --plan examples/prostate.toml --steps 30000",
            ),
        ),
        "luna16": Dataset(
            "LUNA16: chest CT, subset0 of ten, with the lung masks and the table of nodules of all",
            (Remote(f"{_LUNA}/annotations.csv"), Remote(f"{_LUNA}/seg-lungs-LUNA16.zip"), _luna_part(0)),
            _LUNA_LICENCE,
            _LUNA_HOME,
            "subset0/*.mhd, seg-lungs-LUNA16/*.mhd with the same names, annotations.csv",
            "data/luna16",
            _LUNA_NEXT,
        ),
        **{
            f"luna16-subset{number}": Dataset(
                f"LUNA16, subset{number}: chest CT; fetch luna16 first",
                (_luna_part(number),),
                _LUNA_LICENCE,
                _LUNA_HOME,
                f"subset{number}/*.mhd",
                "data/luna16",
                _LUNA_NEXT,
            )
            for number in range(1, 10)
        },
    }
)
"""Data sets by name."""
