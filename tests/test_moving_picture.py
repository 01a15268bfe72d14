"""The moving picture: training is watched as it happens, frames follow it, the files are light."""

from io import BytesIO

import pytest
import torch
from PIL import Image, ImageColor

from tools import moving_picture
from tools.moving_picture import FILES, FRAME, LAST, Snapshot, animate, draw, watch_training
from utils.look import COLOURS
from utils.session import ROOT


def test_training_is_watched_at_its_steps_and_comes_out_the_same_again():
    first, second = (watch_training(n_steps=4, every=2) for _ in range(2))
    assert [shot.step for shot in first] == [0, 2, 4]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.pattern, b.pattern) and a.losses == b.losses
        assert torch.allclose(a.pattern.sum(-1), torch.ones(len(a.pattern)), atol=1e-5)


@pytest.mark.parametrize("dark", FILES)
def test_more_attention_is_further_from_the_page(dark):
    n = 47
    light = [ImageColor.getrgb(colour) for colour in COLOURS[:2]]
    colours = map(ImageColor.getrgb, moving_picture.ON_DARK) if dark else light
    shots = [Snapshot(step, torch.eye(n) * share, (4.0, 3.0)) for step, share in ((0, 0), (9, 1))]
    frames = draw(shots, dark)
    assert frames[0].getpixel((879, 4))[3] == 0  # the page shows through, whatever its colour
    assert len({c for _, c in frames[1].convert("RGB").getcolors(999)} & {*colours}) == 2
    middle = moving_picture.MAP[0] + 4, moving_picture.MAP[1] + 4  # of the first cell
    page, seen = (frame.convert("L").getpixel(middle) for frame in frames)
    assert abs(seen - page) > 100 and (seen > page) == dark
    with Image.open(BytesIO(animate(frames))) as picture:
        assert (picture.n_frames, picture.size) == (2, moving_picture.SIZE)
        times = [(picture.seek(i), picture.load(), picture.info["duration"])[2] for i in range(2)]
        assert times == [FRAME, LAST]


@pytest.mark.parametrize("name", FILES.values())
def test_committed_pictures_move_and_are_light(name):
    path = ROOT / "project-1-induction-heads/figures" / name
    assert path.stat().st_size < 1_000_000
    with Image.open(path) as picture:
        frames = moving_picture.STEPS // moving_picture.EVERY + 1
        assert (picture.format, picture.n_frames) == ("WEBP", frames)
