"""The moving picture of the README: a head's attention finds its stripe while the loss falls.

The two-layer toy is trained again, from its seed, and its best induction head drawn every few
steps; one file for a light page and one for a dark one.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from tools.pictures import with_palette
from utils.heads import attention_patterns, prefix_matching_score, score_heads
from utils.ledger.results import write_file
from utils.look import COLOURS
from utils.metrics import half_losses, per_token_loss
from utils.prompts import repeated_tokens
from utils.session import ROOT
from utils.toy import HELD_OUT, HELD_OUT_SEED, LONGEST, build_toy, toy_batch

STEPS, EVERY = 240, 4  # the loss falls around step 140
LAYER = 1  # where induction heads form
FRAME, LAST = 110, 3000  # milliseconds
SIZE, CELL = (880, 460), 8  # pixels: the picture, a cell of the map
MAP, PLOT = (46, 50), (520, 50, 856, 426)  # left top of the map; left, top, right, bottom
HIGHEST = 5.0  # nats, the top of the plot
ON_DARK = ["#58aef0", "#ff9a4d"]  # the first colours of figures, on a dark page
FILES = {False: "training.webp", True: "training_dark.webp"}


class Snapshot(NamedTuple):
    """A step of training: mean attention [dest src] of one head, mean loss of either copy."""

    step: int
    pattern: torch.Tensor
    losses: tuple[float, float]


def watch_training(n_steps: int = STEPS, every: int = EVERY) -> list[Snapshot]:
    """Train the toy of the notebook and keep the pattern of the head that ends as the best one."""
    model = build_toy(n_layers=2)
    tokens = repeated_tokens(model, HELD_OUT, LONGEST, seed=HELD_OUT_SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(n_steps + 1):
        if step % every == 0:
            with torch.no_grad():
                halves = half_losses(per_token_loss(model, tokens), LONGEST)
                losses = tuple(half.mean().item() for half in halves)
                patterns = attention_patterns(model, tokens).mean(0)[LAYER]
            seen.append((step, patterns, losses))
        loss = model(toy_batch(generator), return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    best = int(score_heads(model, tokens, prefix_matching_score).mean(0)[LAYER].argmax())
    return [Snapshot(step, patterns[best], losses) for step, patterns, losses in seen]


def draw(shots: Sequence[Snapshot], dark: bool = False) -> list[Image.Image]:
    """A frame for each snapshot: the map on the left, both losses up to its step on the right.

    The page is transparent: dark pages differ.
    """
    page, ink, faint = ("#0d1117", "#e6edf3", "#9198a1") if dark else ("#fff", "#1f2328", "#656d76")
    full, copies = ("#79c0ff", ON_DARK) if dark else ("#08306b", COLOURS[:2])
    large, small = ImageFont.load_default(28), ImageFont.load_default(20)
    left, top, right, bottom = PLOT
    last = max(shots[-1].step, 1)
    side = CELL * len(shots[0].pattern)
    half = CELL * (len(shots[0].pattern) + 1) // 2  # the start token is before the first copy

    def at(step: float, loss: float) -> tuple[float, float]:
        share = min(loss, HIGHEST) / HIGHEST
        return left + step / last * (right - left), bottom - share * (bottom - top)

    frames = []
    for i, shot in enumerate(shots):
        frame = Image.new("RGB", SIZE, page)
        pen = ImageDraw.Draw(frame)
        seen = shot.pattern.clamp(0, 1) ** (
            0.6 if dark else 1
        )  # faint light is lost on a dark page
        shown = Image.fromarray((seen * 255).byte().numpy())
        shown = shown.resize((side, side), Image.Resampling.NEAREST)
        frame.paste(Image.new("RGB", shown.size, full), MAP, shown)
        pen.rectangle([MAP[0] - 1, MAP[1] - 1, MAP[0] + side, MAP[1] + side], outline=faint)
        pen.line([MAP[0] + half, MAP[1], MAP[0] + half, MAP[1] + side], faint)
        pen.line([MAP[0], MAP[1] + half, MAP[0] + side, MAP[1] + half], faint)
        pen.text((MAP[0], 8), "where one head looks", ink, large)
        for middle, copy in ((half / 2, "first copy"), ((half + side) / 2, "second copy")):
            below = (MAP[0] + middle, MAP[1] + side + 6)
            pen.text(below, f"to {copy}", faint, small, anchor="mt")
            beside = Image.new("L", (side // 2, 28))
            where = (beside.width / 2, 14)
            ImageDraw.Draw(beside).text(where, f"from {copy}", 255, small, anchor="mm")
            upright = beside.rotate(90, expand=True)
            corner = (MAP[0] - 34, int(MAP[1] + middle - upright.height / 2))
            frame.paste(Image.new("RGB", upright.size, faint), corner, upright)
        pen.text((left, 8), "loss on both copies (nats)", ink, large)
        pen.line([left, top, left, bottom, right, bottom], faint)
        for loss in range(int(HIGHEST) + 1):
            pen.text((left - 10, at(0, loss)[1]), str(loss), faint, small, anchor="rm")
        pen.text((left, bottom + 6), f"step {shot.step} of training", ink, small)
        for copy, name in enumerate(("first copy", "second copy")):
            points = [at(s.step, s.losses[copy]) for s in shots[: i + 1]]
            pen.line(points, copies[copy], 4, joint="curve")
            x, y = points[-1]
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=copies[copy])
            above = copy == 0 or y > bottom - 40  # each name at the end of its line, off the other
            side_of_end = "r" if x > (left + right) / 2 else "l"
            anchor = side_of_end + ("b" if above else "t")
            off = 10 if not above else -10 if copy == 0 else -30
            along = 16 if side_of_end == "r" else 0
            pen.text((x + along, y + off), name, copies[copy], small, anchor=anchor)
        frame = with_palette(frame).convert("RGBA")
        clear = (np.asarray(frame)[..., :3] == ImageColor.getrgb(page)).all(-1)
        frame.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        frames.append(frame)
    return frames


def animate(frames: Sequence[Image.Image]) -> bytes:
    """The frames as an animated WebP that plays three times, with a pause on the last one."""
    times = [FRAME] * (len(frames) - 1) + [LAST]
    file = BytesIO()
    look = dict(lossless=True, quality=80, method=4, loop=3)
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=times, **look)
    return file.getvalue()


def write_moving_pictures(folder: Path = ROOT / "project-1-induction-heads/figures") -> None:
    """Train, draw and write both files."""
    shots = watch_training()
    for dark, name in FILES.items():
        write_file(folder / name, animate(draw(shots, dark)))
