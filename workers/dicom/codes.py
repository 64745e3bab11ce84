"""Which coded concept a structure has, and which structure of a DICOM object is which label.

The codes are SNOMED CT as DICOM PS3.16 names them in its context groups for segmented structures (CID 7151 and those it
includes); a structure's side is a modifier beside its code, from CID 244.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pydicom.sr.coding import Code

from vnet_core.errors import ScanError
from vnet_core.plan import Label

TISSUE = Code("85756007", "SCT", "Tissue")
"""The type of a structure that nobody has named a code for."""
ANATOMICAL = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
SIDES = MappingProxyType({"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")})

_STRUCTURES = {
    "adrenal gland": ("23451007", "Adrenal gland"),
    "amygdala": ("4958002", "Amygdala"),
    "aorta": ("15825003", "Aorta"),
    "artery": ("51114001", "Artery"),
    "bladder": ("89837001", "Bladder"),
    "bone": ("272673000", "Bone"),
    "brain": ("12738006", "Brain"),
    "brain stem": ("119238007", "Brain Stem"),
    "breast": ("76752008", "Breast"),
    "caudate": ("11000004", "Caudate Nucleus"),
    "cerebellum": ("113305005", "Cerebellum"),
    "cerebrospinal fluid": ("65216001", "Cerebrospinal Fluid"),
    "clavicle": ("51299004", "Clavicle"),
    "colon": ("71854001", "Colon"),
    "duodenum": ("38848004", "Duodenum"),
    "esophagus": ("32849002", "Esophagus"),
    "eye": ("81745001", "Eye"),
    "femoral head": ("2812003", "Head of femur"),
    "femur": ("71341001", "Femur"),
    "gallbladder": ("28231008", "Gallbladder"),
    "gray matter": ("389081007", "Gray matter"),
    "heart": ("80891009", "Heart"),
    "hippocampus": ("5366008", "Hippocampus"),
    "humerus": ("85050009", "Humerus"),
    "inferior vena cava": ("64131007", "Inferior vena cava"),
    "kidney": ("64033007", "Kidney"),
    "left atrium": ("82471001", "Left atrium"),
    "left ventricle": ("87878005", "Left ventricle"),
    "liver": ("10200004", "Liver"),
    "lung": ("39607008", "Lung"),
    "lymph node": ("59441001", "Lymph Node"),
    "mandible": ("91609006", "Mandible"),
    "optic chiasm": ("244453006", "Optic chiasm"),
    "optic nerve": ("18234004", "Optic nerve"),
    "pancreas": ("15776009", "Pancreas"),
    "parotid gland": ("45289007", "Parotid gland"),
    "portal vein": ("32764006", "Portal vein"),
    "prostate": ("41216001", "Prostate"),
    "peripheral zone": ("279706003", "Peripheral zone of the prostate"),
    "transition zone": ("399384005", "Transition zone of the prostate"),
    "putamen": ("89278009", "Putamen"),
    "rectum": ("34402009", "Rectum"),
    "rib": ("113197003", "Rib"),
    "right atrium": ("73829009", "Right atrium"),
    "right ventricle": ("53085002", "Right ventricle"),
    "sacrum": ("54735007", "Sacrum"),
    "scapula": ("79601000", "Scapula"),
    "seminal vesicle": ("64739004", "Seminal vesicle"),
    "skeletal muscle": ("127954009", "Skeletal muscle"),
    "small bowel": ("30315005", "Small intestine"),
    "small intestine": ("30315005", "Small intestine"),
    "spinal cord": ("2748008", "Spinal cord"),
    "spleen": ("78961009", "Spleen"),
    "sternum": ("56873002", "Sternum"),
    "stomach": ("69695003", "Stomach"),
    "thalamus": ("42695009", "Thalamus"),
    "thyroid": ("69748006", "Thyroid"),
    "trachea": ("44567001", "Trachea"),
    "ureter": ("87953007", "Ureter"),
    "urethra": ("13648007", "Urethra"),
    "urinary bladder": ("89837001", "Bladder"),
    "uterus": ("35039007", "Uterus"),
    "vein": ("29092000", "Vein"),
    "vertebra": ("51282000", "Vertebra"),
    "white matter": ("389080008", "White matter"),
}
_ABNORMAL = {
    "cyst": ("367643001", "Cyst"),
    "edema": ("79654002", "Edema"),
    "hemorrhage": ("50960005", "Hemorrhage"),
    "lesion": ("52988006", "Lesion"),
    "necrosis": ("6574001", "Necrosis"),
    "neoplasm": ("108369006", "Neoplasm"),
    "nodule": ("27925004", "Nodule"),
    "tumor": ("108369006", "Neoplasm"),
}
_SPELLINGS = MappingProxyType(
    {"grey": "gray", "haemorrhage": "hemorrhage", "oedema": "edema", "oesophagus": "esophagus", "tumour": "tumor"}
)


@dataclass(frozen=True, slots=True)
class Concept:
    """What a structure is: DICOM's category, type and, for a paired structure, side."""

    category: Code
    type: Code
    side: str = ""
    """`left`, `right` or empty."""


@dataclass(frozen=True, slots=True)
class Structure:
    """One segment or region of interest of a DICOM object."""

    number: int
    name: str
    types: tuple[Code, ...] = ()
    side: str = ""
    """`left`, `right` or empty."""


def words(name: str) -> tuple[str, ...]:
    """What counts of a name: its words in alphabetical order, without case; `kidney_left` is `Left kidney`."""
    found = re.findall(r"[^\W_]+", name.casefold())
    return tuple(sorted(_SPELLINGS.get(word, word) for word in found))


_BY_WORDS = MappingProxyType(
    {
        words(name): Concept(category, Code(value, "SCT", meaning))
        for table, category in ((_STRUCTURES, ANATOMICAL), (_ABNORMAL, ABNORMAL))
        for name, (value, meaning) in table.items()
    }
)


def concept_of(label: Label) -> Concept | None:
    """The label's own code, else the one known for its name; None for a name without one."""
    side = next((side for side in SIDES if side in words(label.name)), "")
    if label.code:
        scheme, value, meaning = label.code.split(":", 2)
        code = Code(value, scheme, meaning)
        abnormal = any(code == known.type for known in _BY_WORDS.values() if known.category is ABNORMAL)
        return Concept(ABNORMAL if abnormal else ANATOMICAL, code, side)
    whole = _BY_WORDS.get(words(label.name))
    if whole is not None:
        return whole
    known = _BY_WORDS.get(tuple(word for word in words(label.name) if word not in SIDES))
    return Concept(known.category, known.type, side) if known is not None else None


def values_of(structures: Sequence[Structure], labels: Sequence[Label]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Which label value each structure has, by its number, and the codes of warnings.

    Without labels the structures get the values 1, 2, 3 in their order. With labels, each structure is the label of its
    name (:func:`words`), else the one label of its code and side; several structures of one label are joined. Those
    that are no label are left out with the warning ``label.left-out``; ``ScanError`` ``label.no-structure`` when all
    are.
    """
    if not structures:
        raise ScanError("label.no-structure", "the file holds no structure; export it again with its structures")
    if not labels:
        return {structure.number: value for value, structure in enumerate(structures, 1)}, ()
    by_name = {words(label.name): label.value for label in reversed(labels)}
    values = {}
    for structure in structures:
        value = by_name.get(words(structure.name))
        if value is None:
            coded = [label.value for label in labels if _same(structure, concept_of(label))]
            value = coded[0] if len(coded) == 1 else None
        if value is not None:
            values[structure.number] = value
    if not values:
        raise ScanError(
            "label.no-structure",
            f"none of the file's {len(structures)} structures has the name or code of one of the {len(labels)} labels;"
            " name the labels as the file does, or give them its codes",
        )
    return values, ("label.left-out",) if len(values) < len(structures) else ()


def _same(structure: Structure, concept: Concept | None) -> bool:
    # == of Code knows the older SRT codes too
    return concept is not None and concept.side == structure.side and concept.type in structure.types
