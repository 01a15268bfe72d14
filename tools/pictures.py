"""What a notebook stores of a figure, made light: the picture beside it, and its numbers."""

import base64
import itertools
from io import BytesIO

import numpy as np
import oxipng
from PIL import Image

# Flat areas (bars, cells of a map, the page) have the colours that they were drawn in, up to so
# many, and a colour bar has enough to show no bands. Edges of letters and lines, where most of the
# bytes go, share a few, those that run along a row some more.
BAR, FLAT, ROWS, EDGES = 56, 156, 12, 10
FINE = 64, 96, 16, 80  # the same for a picture that may be larger
DARK_PAGE = (13, 17, 23)
# Reds on a dark page, by their lightness on a light one: as page/figures.js has them.
RED_LIGHTNESS = (51, 101, 145, 187, 226, 247)
DARK_REDS = np.array(
    [(255, 124, 122), (236, 70, 74), (186, 48, 54), (128, 38, 42), (84, 36, 38), (28, 30, 34)]
)
# This method and k-means keep rare colours; the default does not.
PALETTE = dict(method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)


def with_palette(
    picture: Image.Image, most: tuple[int, int, int, int] = (BAR, FLAT, ROWS, EDGES)
) -> Image.Image:
    """The picture with at most 256 colours, those of flat areas unchanged unless there are more."""
    rgb = np.asarray(picture.convert("RGB"))
    index = np.zeros(rgb.shape[:2], np.uint8)
    rows = _blocks(rgb, 1, 16, off=2)
    bar = rows & _shaded(rgb)
    flat = _blocks(rgb, 2, 2) & ~bar
    rows &= ~bar & ~flat
    palettes, first = [], 0
    for where, n_colours in zip((bar, flat, rows, ~(bar | flat | rows)), most, strict=True):
        if not where.any():
            continue
        palette, index_there = _palette(rgb[where], n_colours)
        index[where] = index_there + first
        palettes.append(palette)
        first += len(palette)
    light = Image.fromarray(index)
    light.putpalette(np.concatenate(palettes).tobytes())
    return light


def _shaded(rgb: np.ndarray) -> np.ndarray:
    """Where colours change slowly, one way and every few rows: as in a colour bar."""
    rgb, n = rgb.astype(np.int16), 24  # rows that are looked at
    steps = abs(np.diff(rgb, axis=0)).max(-1)

    def in_rows(values: np.ndarray) -> np.ndarray:
        total = np.cumsum(np.pad(values, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
        return total[n:] - total[:-n]

    across = abs(rgb[n:] - rgb[:-n]).max(-1)
    slow = (in_rows(steps > 4) == 0) & (in_rows(steps > 0) > 2)
    return np.pad(slow & (across > 0.5 * in_rows(steps)), ((n // 2, n // 2), (0, 0)))


def _blocks(rgb: np.ndarray, n_down: int, n_right: int, off: int = 0) -> np.ndarray:
    """Which pixels lie in a block of that size that has one colour, give or take `off` of 255."""
    rgb = rgb.astype(np.int16)
    height, width = rgb.shape[0] - n_down + 1, rgb.shape[1] - n_right + 1
    offsets = list(itertools.product(range(n_down), range(n_right)))
    same, inside = np.ones((height, width), bool), np.zeros(rgb.shape[:2], bool)
    for down, right in offsets:
        other = rgb[down : down + height, right : right + width]
        same &= (abs(rgb[:height, :width] - other) <= off).all(-1)
    for down, right in offsets:
        inside[down : down + height, right : right + width] |= same
    return inside


def _palette(pixels: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many colours for pixels [pixel rgb], and which of them each pixel has."""
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, index = np.unique(codes, return_inverse=True)
    if len(found) <= most:
        return np.stack([found >> 16, found >> 8, found], -1).astype(np.uint8), index
    reduced = Image.fromarray(pixels[None]).quantize(colors=most, **PALETTE)
    return np.array(reduced.getpalette(), np.uint8).reshape(-1, 3), np.asarray(reduced)[0]


def darkened(content: bytes) -> bytes:
    """A stored picture for a dark page: each colour keeps its hue and has the opposite lightness.

    Reds apart, as page/figures.js does it to the figures of pages, but that white becomes GitHub's
    dark grey.
    """
    with Image.open(BytesIO(content)) as picture:
        rgb = np.asarray(picture.convert("RGB"))
    palette, index = _palette(rgb.reshape(-1, 3), 256)
    colours, page = palette.astype(int), np.array(DARK_PAGE)
    high, low = colours.max(1), colours.min(1)
    lightness = (high + low) / 2
    shift = 255 * (1 - lightness / 255) ** 0.85 - lightness
    opposite = (colours + shift[:, None]).clip(0, 255)
    shown = page + opposite * (255 - page) / 255
    red, green, blue = colours.T
    reds = (red == high) & (high - low > 20) & (abs(green - blue) < 0.42 * (high - low))
    for part in range(3):
        shown[reds, part] = np.interp(lightness[reds], RED_LIGHTNESS, DARK_REDS[:, part])
    dark = Image.fromarray(index.reshape(rgb.shape[:2]).astype(np.uint8))
    dark.putpalette(shown.round().astype(np.uint8).tobytes())
    return png(dark)


def lighten_numbers(figure: dict) -> None:
    """Coordinates of a stored figure in single precision, packed as plotly packs arrays.

    A list of numbers takes a line each in a notebook's file.
    """
    traces = figure["data"] + [t for frame in figure.get("frames", []) for t in frame["data"]]
    for trace in traces:
        for name in {"x", "y"} & trace.keys():
            values = trace[name]
            if isinstance(values, dict) and values["dtype"] == "f8" and "shape" not in values:
                numbers = np.frombuffer(base64.b64decode(values["bdata"]), "f8")
            elif isinstance(values, list) and {*map(type, values)} <= {int, float} and values[4:]:
                numbers = np.array(values)
            else:
                continue
            packed = base64.b64encode(numbers.astype("f4").tobytes()).decode()
            trace[name] = dict(dtype="f4", bdata=packed)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file, a sixth smaller than it is usually packed."""
    file = BytesIO()
    picture.save(file, "PNG")
    return oxipng.optimize_from_memory(file.getvalue(), level=4, grayscale_reduction=False)
