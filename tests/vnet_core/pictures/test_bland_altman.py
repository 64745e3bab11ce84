"""Bland-Altman plots: small files, whatever the names, of the structures that differ most."""

import io

import pytest
from PIL import Image

from vnet_core.pictures.bland_altman import bland_altman_picture


@pytest.mark.parametrize("labels", [0, 1, 2, 9])
def test_a_plot_of_volumes_is_a_small_png_whatever_the_names(labels):
    volumes = {f"$x_{n}$ <b>|": [(10.0 + n, 11.0), (20.0, 19.0), (0.0, 0.0)] for n in range(labels)}
    png = bland_altman_picture(volumes, "liver@v2 against $\\frac$")
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert len(png) < 120_000
    assert png == bland_altman_picture(volumes, "liver@v2 against $\\frac$")


def test_a_plot_shows_the_structures_that_differ_most():
    same = {f"same {n}": [(10.0, 10.0), (20.0, 20.0)] for n in range(6)}
    drawn = bland_altman_picture({**same, "other": [(10.0, 15.0), (20.0, 27.0)]}, "t")
    assert drawn != bland_altman_picture(same, "t")
