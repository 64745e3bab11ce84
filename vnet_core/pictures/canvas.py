"""Drawing greys with coloured lines on top, few enough colours for a small PNG."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from vnet_core.colours import COLOURS, rgb

BACKGROUND, FAINT, TEXT = 24, 150, 235
"""Greys of what lies behind everything, of notes and of text."""

_ALPHAS = 4
_UNDER = 6
"""A line pixel is one of ``_ALPHAS`` opacities over one of ``_UNDER`` greys, so that 256 colours hold smooth lines."""

_FINE = 3
"""Outlines are drawn this many times finer than the picture and averaged."""


class Canvas:
    """Greys with coloured lines on top, held so that the final 256 colours are known beforehand."""

    def __init__(self, height: int, width: int) -> None:
        self.grey = Image.new("L", (width, height), BACKGROUND)
        self.opacity = np.zeros((height, width), np.uint8)
        self.colour = np.zeros((height, width), np.uint8)
        self._draw = ImageDraw.Draw(self.grey)

    def text(self, x: float, y: float, text: str, anchor: str = "lm", *, level: int = TEXT, size: int = 13) -> None:
        """Text anchored at a point, in Pillow's two letters."""
        self._draw.text((x, y), text, fill=level, font=ImageFont.load_default(size), anchor=anchor)

    def text_px(self, text: str, size: int = 13) -> float:
        """Width of a text."""
        return self._draw.textlength(text, font=ImageFont.load_default(size))

    def shortened(self, text: str, limit_px: float, size: int = 13) -> str:
        """The text on one line, with its end cut off where it is wider than ``limit_px``."""
        text = " ".join(text.split())
        if self.text_px(text, size) <= limit_px:
            return text
        while text and self.text_px(text + "...", size) > limit_px:
            text = text[:-1]
        return text + "..."

    def rule(self, x0: int, x1: int, y: int, *, ticks_px: int = 0) -> None:
        """A horizontal line with end ticks."""
        self._draw.line((x0, y, x1, y), fill=TEXT, width=2)
        for x in (x0, x1):
            self._draw.line((x, y - ticks_px, x, y + ticks_px), fill=TEXT, width=2)

    def swatch(self, x: int, y: int, colour: int) -> None:
        """A filled square centred at a height."""
        self.opacity[y - 5 : y + 6, x : x + 11] = 255
        self.colour[y - 5 : y + 6, x : x + 11] = colour

    def outline(self, x: int, y: int, opacity: np.ndarray, colour: int) -> None:
        """Line opacities 0 to 255 (H, W); a pixel that two lines share takes the colour of the more opaque one."""
        window = (slice(y, y + opacity.shape[0]), slice(x, x + opacity.shape[1]))
        over = (opacity > 0) & (opacity >= self.opacity[window])
        self.opacity[window][over] = opacity[over]
        self.colour[window][over] = colour

    def png(self, greys: int) -> bytes:
        """The picture with that many greys."""
        grey = np.asarray(self.grey, np.float32) / 255
        alpha = np.rint(self.opacity / 255 * _ALPHAS).astype(int)
        under = np.rint(grey * (_UNDER - 1)).astype(int)
        per_colour = _ALPHAS * _UNDER
        line = greys + (self.colour.astype(int) * _ALPHAS + alpha - 1) * _UNDER + under
        index = np.where(alpha > 0, line, np.rint(grey * (greys - 1)).astype(int))
        palette = np.zeros((greys + len(COLOURS) * per_colour, 3))
        palette[:greys] = np.linspace(0, 255, greys)[:, None]
        for c in range(len(COLOURS)):
            for a in range(_ALPHAS):
                share = (a + 1) / _ALPHAS
                blend = share * np.array(rgb(c)) + (1 - share) * np.linspace(0, 255, _UNDER)[:, None]
                start = greys + c * per_colour + a * _UNDER
                palette[start : start + _UNDER] = blend
        assert len(palette) <= 256
        picture = Image.fromarray(index.astype(np.uint8), "P")
        picture.putpalette(np.rint(palette).astype(np.uint8).tobytes())
        out = io.BytesIO()
        picture.save(out, "PNG", optimize=True)
        return out.getvalue()


def outline(mask: np.ndarray, panel: tuple[int, int], thick: bool) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Outline of a mask (rows, columns) that fills a panel (height, width) in pixels.

    Returns the y and x in the panel of two windows, float32 (H, W) from 0 to 1: the line, and a wider halo around it.
    """
    # the window: the mask and two pixels around it
    spans, boxes = [], []
    for a, pixels in enumerate(panel):
        hit = np.flatnonzero(mask.any(axis=1 - a))
        scale = pixels / mask.shape[a]
        start = max(0, math.floor(hit[0] * scale) - 2)
        stop = min(pixels, math.ceil((hit[-1] + 1) * scale) + 2)
        spans.append((start, stop))
        boxes.append((start / scale, min(stop / scale, mask.shape[a])))
    (y0, y1), (x0, x1) = spans
    fine = Image.fromarray(mask.astype(np.float32)).resize(
        ((x1 - x0) * _FINE, (y1 - y0) * _FINE),
        Image.Resampling.BILINEAR,
        box=(boxes[1][0], boxes[0][0], boxes[1][1], boxes[0][1]),
    )
    # where even the fine pixels are larger than voxels, a lower threshold keeps single voxels visible
    coarse = math.prod(min(1.0, p * _FINE / n) for p, n in zip(panel, mask.shape, strict=True))
    inside = np.asarray(fine) >= 0.5 * coarse
    inside |= ndimage.maximum_filter(_specks(inside), 3 * _FINE, mode="constant")
    # inside the mask, so that neighbours do not cover each other's line, and closed at the edge of the image
    line = inside & ~ndimage.minimum_filter(inside, 11 if thick else 7, mode="constant")
    halo = ndimage.maximum_filter(line, 2 * _FINE + 1, mode="constant")
    return y0, x0, _averaged(line), _averaged(halo)


def _specks(inside: np.ndarray) -> np.ndarray:
    """The pieces of a fine mask that would be smaller than four pixels in the picture, and easily overlooked."""
    pieces, _ = ndimage.label(inside)
    area = np.bincount(pieces.ravel())
    area[0] = inside.size
    return (area < 4 * _FINE**2)[pieces] & inside


def _averaged(fine: np.ndarray) -> np.ndarray:
    """The share of true fine pixels in each pixel, float32."""
    total = np.zeros((fine.shape[0] // _FINE, fine.shape[1] // _FINE), np.float32)
    for i in range(_FINE):
        for j in range(_FINE):
            total += fine[i::_FINE, j::_FINE]
    return total / _FINE**2
