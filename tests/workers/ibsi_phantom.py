"""IBSI's digital phantom as one of our scans with one of our masks, and the values that IBSI published for it.

Voxels and values are those of the reference manual of the Image Biomarker Standardisation Initiative (Zwanenburg et
al., arXiv:1612.07003, and Radiology 2020, 295:328-338): 5 x 4 x 4 voxels of 2 mm, 74 of them in the region of interest,
read without resampling and with their intensities as grey levels. Textures: 3-D, averaged over directions.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from vnet_core.volume import Volume
from workers.cohort import Case, Cohort, Entry, Verdict, result_key, save_cohort, save_entry, source_digest, volume_key
from workers.dicom.derived import Algorithm
from workers.ledger import Outcome
from workers.nights.record import Night, begin
from workers.registry.models import Target, publish
from workers.reports.report import write_night
from workers.segmentation.masks import Mask, publish_mask
from workers.sources.scans import write_volume
from workers.storage.store import Root

OUT = 9
"""Of the voxels outside the region of interest, brighter than any inside."""
VOXELS = np.array(
    [
        [[1, 4, 4, 1, 1], [1, 4, 6, 1, 1], [4, 1, 6, 4, 1], [4, 4, 6, 4, 1]],
        [[1, 4, 4, 1, 1], [1, 1, 6, 1, 1], [OUT, 1, 3, 1, 1], [4, 4, 6, 1, 1]],
        [[1, 4, 4, OUT, OUT], [1, 1, 1, 1, 1], [1, 1, OUT, 1, 1], [1, 1, 6, 1, 1]],
        [[1, 4, 4, OUT, OUT], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 6, 1, 1]],
    ],
    np.int16,
)
"""(Z, Y, X)"""
INSIDE = VOXELS != OUT
GRID = Geometry((4, 4, 5), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
MORPHOLOGY = """
morph_volume 556 4; morph_vol_approx 592 4; morph_area_mesh 388 3; morph_av 0.698 0.004; morph_comp_1 0.0411 0.0003
morph_comp_2 0.599 0.004; morph_sph_dispr 1.19 0.01; morph_sphericity 0.843 0.005; morph_asphericity 0.186 0.001
morph_com 0.672 0.004; morph_diam 13.1 0.1; morph_pca_maj_axis 11.4 0.1; morph_pca_min_axis 9.31 0.06
morph_pca_least_axis 8.54 0.05; morph_pca_elongation 0.816 0.005; morph_pca_flatness 0.749 0.005
morph_vol_dens_aabb 0.869 0.005; morph_area_dens_aabb 0.866 0.005; morph_vol_dens_aee 1.17 0.01
morph_area_dens_aee 1.36 0.01; morph_vol_dens_conv_hull 0.961 0.006; morph_area_dens_conv_hull 1.03 0.01
morph_integ_int 1200 10; morph_moran_i 0.0397 0.0003; morph_geary_c 0.974 0.006
"""
"""Name, value, tolerance."""
INTENSITY = """
stat_mean 2.15; stat_var 3.05; stat_skew 1.08; stat_kurt -0.355; stat_median 1; stat_min 1; stat_p10 1; stat_p90 4
stat_max 6; stat_iqr 3; stat_range 5; stat_mad 1.55; stat_rmad 1.11; stat_medad 1.15; stat_cov 0.812; stat_qcod 0.6
stat_energy 567; stat_rms 2.77
ih_mean 2.15; ih_var 3.05; ih_skew 1.08; ih_kurt -0.355; ih_median 1; ih_min 1; ih_p10 1; ih_p90 4; ih_max 6; ih_mode 1
ih_iqr 3; ih_range 5; ih_mad 1.55; ih_rmad 1.11; ih_medad 1.15; ih_cov 0.812; ih_qcod 0.6; ih_entropy 1.27
ih_uniformity 0.512; ih_max_grad 8; ih_max_grad_g 3; ih_min_grad -50; ih_min_grad_g 1
"""
TEXTURE = """
cm_joint_max_3D_avg 0.503; cm_joint_avg_3D_avg 2.14; cm_joint_var_3D_avg 3.1; cm_joint_entr_3D_avg 2.4
cm_diff_avg_3D_avg 1.43; cm_diff_var_3D_avg 3.06; cm_diff_entr_3D_avg 1.56; cm_sum_avg_3D_avg 4.29
cm_sum_var_3D_avg 7.07; cm_sum_entr_3D_avg 1.92; cm_energy_3D_avg 0.303; cm_contrast_3D_avg 5.32
cm_dissimilarity_3D_avg 1.43; cm_inv_diff_3D_avg 0.677; cm_inv_diff_norm_3D_avg 0.851; cm_inv_diff_mom_3D_avg 0.618
cm_inv_diff_mom_norm_3D_avg 0.898; cm_inv_var_3D_avg 0.0604; cm_corr_3D_avg 0.157; cm_auto_corr_3D_avg 5.06
cm_clust_tend_3D_avg 7.07; cm_clust_shade_3D_avg 16.6; cm_clust_prom_3D_avg 145; cm_info_corr1_3D_avg -0.157
cm_info_corr2_3D_avg 0.52
rlm_sre_3D_avg 0.705; rlm_lre_3D_avg 3.06; rlm_lgre_3D_avg 0.603; rlm_hgre_3D_avg 9.7; rlm_srlge_3D_avg 0.352
rlm_srhge_3D_avg 8.54; rlm_lrlge_3D_avg 2.39; rlm_lrhge_3D_avg 17.6; rlm_glnu_3D_avg 21.8; rlm_glnu_norm_3D_avg 0.43
rlm_rlnu_3D_avg 26.9; rlm_rlnu_norm_3D_avg 0.513; rlm_r_perc_3D_avg 0.68; rlm_gl_var_3D_avg 3.46
rlm_rl_var_3D_avg 0.574; rlm_rl_entr_3D_avg 2.43
szm_sze_3D 0.255; szm_lze_3D 550; szm_lgze_3D 0.253; szm_hgze_3D 15.6; szm_szlge_3D 0.0256; szm_szhge_3D 2.76
szm_lzlge_3D 503; szm_lzhge_3D 1490; szm_glnu_3D 1.4; szm_glnu_norm_3D 0.28; szm_zsnu_3D 1; szm_zsnu_norm_3D 0.2
szm_z_perc_3D 0.0676; szm_gl_var_3D 2.64; szm_zs_var_3D 331; szm_zs_entr_3D 2.32
dzm_sde_3D 1; dzm_lde_3D 1; dzm_lgze_3D 0.253; dzm_hgze_3D 15.6; dzm_sdlge_3D 0.253; dzm_sdhge_3D 15.6
dzm_ldlge_3D 0.253; dzm_ldhge_3D 15.6; dzm_glnu_3D 1.4; dzm_glnu_norm_3D 0.28; dzm_zdnu_3D 5; dzm_zdnu_norm_3D 1
dzm_z_perc_3D 0.0676; dzm_gl_var_3D 2.64; dzm_zd_var_3D 0; dzm_zd_entr_3D 1.92
ngt_coarseness_3D 0.0296; ngt_contrast_3D 0.584; ngt_busyness_3D 6.54; ngt_complexity_3D 13.5; ngt_strength_3D 0.763
ngl_lde_3D 0.045; ngl_hde_3D 109; ngl_lgce_3D 0.693; ngl_hgce_3D 7.66; ngl_ldlge_3D 0.00963; ngl_ldhge_3D 0.736
ngl_hdlge_3D 102; ngl_hdhge_3D 235; ngl_glnu_3D 37.9; ngl_glnu_norm_3D 0.512; ngl_dcnu_3D 4.86; ngl_dcnu_norm_3D 0.0657
ngl_dc_perc_3D 1; ngl_gl_var_3D 3.05; ngl_dc_var_3D 22.1; ngl_dc_entr_3D 4.4; ngl_dc_energy_3D 0.0533
"""
COHORT = "phantoms"
STARTED = datetime(2026, 11, 22, 1, tzinfo=UTC)


def published() -> dict[str, tuple[float, float]]:
    """Published value and tolerance by feature; where IBSI gives no tolerance it is 0."""
    entries = (
        entry.split() for text in (MORPHOLOGY, INTENSITY, TEXTURE) for entry in text.replace("\n", ";").split(";")
    )
    return {name: (float(value), float(*tolerance)) for name, value, *tolerance in filter(None, entries)}


def phantom() -> Volume:
    return Volume(VOXELS[None], GRID)


def night_of_phantoms(folder: Path, cases: tuple[str, ...] = ("one",), label: str = "region", **plan: object) -> Root:
    """A storage root with a cohort of phantoms, a model, their published masks and the report of one night."""
    root = Root(folder / "root")
    whole = Plan.from_mapping({"labels": [{"value": 1, "name": label}, {"value": 2, "name": "none"}], **plan})
    model = publish(root, Target("organs", "v1", whole), [b"weights"], {}, {})
    save_cohort(root, Cohort(COHORT, (str(folder),), whole.channels, whole.labels))
    entries, outcomes = [], []
    for name in cases:
        scan = folder / f"{name}.nii.gz"
        write_volume(scan, phantom())
        case = Case(name, (str(scan),), digest=source_digest([str(scan)]), geometry=GRID)
        key = result_key(COHORT, case, whole, model.digest)
        provenance = {"model": model.reference, "volume": volume_key(case, whole)}
        publish_mask(
            root, key, Mask(case, INSIDE.astype(np.uint8), whole, "nifti", Algorithm(model.name, ""), provenance)
        )
        entries.append(Entry(case, Verdict("accepted")))
        save_entry(root, COHORT, entries[-1])
        outcomes.append(Outcome(name, "segment", "computed", key=key))
    night = begin(root, Night("", COHORT, model.reference, ""), STARTED)
    write_night(root, night, outcomes, entries)
    return root
