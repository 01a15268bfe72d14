"""The claims that the census tests: rules over many trainings, and the figures that they look at.

Rules as in `induction_claims`. Everything is measured on attention-only toys that learn to repeat:
each rule says what they can show of a claim about language models. `figures(rows)` gives what the
ledger records of each claim, from the rows of a census (`python -m census`).
"""

import math
import re

import pandas as pd
import torch
from torch import Tensor

from utils.ledger.claims import Claim
from utils.ledger.rules import above, at_least, below, every
from utils.metrics import Estimate, estimate
from utils.power_law import fit_power_law, held_out_share

OLSSON = "Olsson et al. 2022"
AOYAMA = "Aoyama et al. 2025, arXiv 2511.16893"
MUSAT = "Musat et al. 2025, arXiv 2511.01033"
TIGGES = "Tigges et al. 2024, arXiv 2407.10827"
TOYS = "34 models of 1 to 40 layers"
PYTHIA = re.compile(r"EleutherAI/pythia-[^@]+@step(\d+)")
PYTHIA_BATCH = 1024 * 2048  # tokens a step
CENTRE = {
    "n_layers": 2,
    "smeared": False,
    "n_heads": 4,
    "d_model": 64,
    "longest": 23,
    "context": 47,
    "batch": 64,
    "lr": 3e-3,
}

CLAIMS: dict[str, Claim] = {
    "census.one_layer": Claim(
        "One attention-only layer never forms an induction head, whatever the seed",
        f"{OLSSON}, argument 2",
        published="none forms",
        published_model="1 layer, attention only",
        quantity="highest prefix-matching score, 0 to 1",
        rule="Measured: the best prefix-matching score of any head over all one-layer trainings "
        "with plain keys. The toys can show that one layer fails where two succeed, on this task. "
        "Holds when it is below 0.2, over three seeds or more.",
        holds=lambda highest, n_seeds: highest < 0.2 and n_seeds >= 3,
    ),
    "census.smeared": Claim(
        "Smeared keys let one layer form them, in every seed",
        f"{OLSSON}, argument 2",
        published="forms",
        published_model="1 layer, smeared keys",
        quantity="lowest of the best prefix-matching scores, 0 to 1",
        rule="Measured: over the one-layer trainings with smeared keys, the lowest of the best "
        "prefix-matching scores. That smearing also speeds two layers up is left to the notebook. "
        "Holds when it is above 0.5, over three seeds or more.",
        holds=lambda lowest, n_seeds: lowest > 0.5 and n_seeds >= 3,
    ),
    "census.depth": Claim(
        "From two layers on induction heads always form",
        f"{OLSSON}, arguments 1 and 2",
        published="in every model of 2 or more layers",
        published_model=TOYS,
        quantity="lowest of the best prefix-matching scores, 0 to 1",
        rule="Measured: over the trainings of two and three layers, of all widths and numbers of "
        "heads, with all else as at the centre, the lowest of the best prefix-matching scores. The "
        "toys reach three layers. Holds when it is above 0.5, over three seeds or more.",
        holds=lambda lowest, n_seeds: lowest > 0.5 and n_seeds >= 3,
    ),
    "census.window": Claim(
        "In-context learning comes in a narrow window of training, whatever the size",
        f"{OLSSON}, argument 1",
        published="over 75 % of the gain inside the window",
        published_model="models of 2 or more layers",
        quantity="share of the in-context-learning score that forms in the window",
        rule="Measured: share of the final in-context-learning score that forms in a quarter of "
        "the training around the sharpest rise of prefix matching; mean over the same trainings as "
        "for depth, its error over settings. What comes before and after on real text, the toys do "
        "not have. Holds when it is above 0.75.",
        n_of="trainings",
        holds=lambda share: above(share, 0.75),
        needs=("census.depth",),
    ),
    "census.same_score": Claim(
        "The in-context-learning score ends at the same value whatever the size",
        f"{OLSSON}, argument 1 and the discussion of constant in-context learning",
        published="about -0.4 nats at every size",
        published_model=TOYS,
        quantity="largest deviation from the centre's score, as a share of it",
        rule="Measured: the largest deviation of a size's mean score from that of the centre, as "
        "a share of the centre's; sizes as for depth. A toy's score is bounded by its task, which "
        "the larger ones solve alike, so agreement is weak evidence. Holds when it is below 0.1.",
        holds=lambda deviation: deviation < 0.1,
        needs=("census.depth",),
    ),
    "census.predicts": Claim(
        "Batch size and context size together predict when induction heads form",
        f"{AOYAMA}, abstract (1)",
        published="a simple equation of the two",
        published_model="language models, natural and synthetic text",
        quantity="share of the variance of log steps that is predicted",
        rule="Measured: share of the variance of log steps to the sharpest drop that a power law "
        "of batch and context size predicts for settings it was not fitted on. The form is ours, "
        "a power law in both; so is the task, where a longer context comes with longer segments. "
        "Settings in which no head formed are left out; each seed is fitted by itself. Holds when "
        "it is above 0.8, over ten settings or more.",
        n_of="seeds",
        holds=lambda share, n_settings: every(above(share, 0.8), n_settings >= 10),
    ),
    "census.size_agnostic": Claim(
        "Model size does not matter for when they form",
        f"{AOYAMA}, abstract (1)",
        published="agnostic to model size",
        published_model="language models",
        quantity="exponent of the number of parameters",
        rule="Measured: exponent of the number of parameters in the steps to the sharpest drop, "
        "over sizes as for depth. Toys span a factor of ten in size at one learning rate. Holds "
        "when it lies between -0.1 and 0.1: ten times the size shifts it by a quarter at most.",
        n_of="seeds",
        holds=lambda exponent: every(above(exponent, -0.1), below(exponent, 0.1)),
        needs=("census.depth",),
    ),
    "census.same_tokens": Claim(
        "Only the product of batch and context size counts, the tokens of a step",
        f"{AOYAMA}, abstract (1); the product is our reading",
        published_model="language models",
        quantity="exponent of context size minus that of batch size",
        rule="Measured: exponent of context size minus that of batch size in the steps to the "
        "sharpest drop, over the plane of both. The paper's equation may weigh them otherwise. "
        "Holds when it lies between -0.25 and 0.25.",
        n_of="seeds",
        holds=lambda difference: every(above(difference, -0.25), below(difference, 0.25)),
    ),
    "census.quadratic": Claim(
        "The time until an induction head forms grows with the square of the context length",
        f"{MUSAT}, abstract",
        published=2,
        published_model="minimal two-layer model on a minimal task",
        quantity="exponent of context size",
        rule="Measured: exponent of context size in the steps to the sharpest drop, at fixed "
        "batch size, over the plane. Their bound is for a modified transformer, a minimal task and "
        "an asymptotic length; our toys predict every token, with Adam, at four lengths within a "
        "factor of three, of which those count at which a head forms, and with segments that grow "
        "alike: they can show whether the square carries over, not whether it is right there. "
        "Holds when it lies between 1.5 and 2.5.",
        n_of="seeds",
        holds=lambda exponent: every(at_least(exponent, 1.5), below(exponent, 2.5)),
    ),
    "census.pythia": Claim(
        "Over the sizes of Pythia, induction heads appear after about the same number of tokens",
        f"{TIGGES}, abstract",
        published="at similar token counts across scale",
        published_model="Pythia, 70M to 2.8B",
        quantity="largest over smallest number of tokens",
        rule="Measured: largest over smallest number of tokens at which the best induction-stripe "
        "score first reaches 0.4, over the sizes measured. Toys say nothing of it. Holds when it "
        "is below two, over three sizes or more.",
        holds=lambda ratio, n_sizes: ratio < 2 and n_sizes >= 3,
        only_for="pythia",
    ),
}


def figures(rows: pd.DataFrame) -> dict[str, tuple]:
    """What each claim's rule looks at, the reported figure first; a figure is nan where rows lack.

    The claim about Pythia is left out until there are rows of two of its sizes.
    """
    done = rows[rows["state"] == "done"]
    toys = done[done["kind"] == "toy"]
    keyed = toys[(toys["n_layers"] == 1) & _at_centre(toys, "n_layers", "smeared")]
    plain, smeared = (keyed[keyed["smeared"] == smears] for smears in (False, True))
    sized = toys[(toys["n_layers"] > 1) & _at_centre(toys, "n_layers", "n_heads", "d_model")]
    plane = toys[_at_centre(toys, "longest", "context", "batch")]
    plane = plane[plane["context"] == 1 + 2 * plane["longest"]]
    found = {
        "census.one_layer": (plain["final_prefix"].max(), plain["seed"].nunique()),
        "census.smeared": (smeared["final_prefix"].min(), smeared["seed"].nunique()),
        "census.depth": (sized["final_prefix"].min(), sized["seed"].nunique()),
        "census.window": (_over_settings(sized, "icl_in_window"),),
        "census.same_score": (_deviation(sized),),
        "census.size_agnostic": (exponents(sized, "n_parameters")[0],),
    }
    _, by_context, difference = emergence_law(plane)
    found["census.predicts"] = _predicted(plane)
    found["census.same_tokens"] = (difference,)
    found["census.quadratic"] = (by_context,)
    tokens = pythia_tokens(done[done["kind"] == "model"])
    if len(tokens) > 1:
        found["census.pythia"] = (max(tokens.values()) / min(tokens.values()), len(tokens))
    return {claim_id: found[claim_id] for claim_id in CLAIMS if claim_id in found}


def exponents(rows: pd.DataFrame, *factors: str) -> list[Estimate]:
    """Exponent of each factor in the steps to the sharpest drop, where heads formed."""
    formed = rows[rows["formed"].astype(bool)] if len(rows) else rows
    try:
        x = {factor: _tensor(formed, factor) for factor in factors}
        law = fit_power_law(x, _tensor(formed, "emergence_step"), _tensor(formed, "seed").long())
    except ValueError:  # too few rows for the factors to vary
        return [Estimate(math.nan, math.nan, 0)] * len(factors)
    return list(law.exponents.values())


def emergence_law(plane: pd.DataFrame) -> tuple[Estimate, Estimate, Estimate]:
    """Exponents of batch size and of context size, and the second minus the first.

    With tokens = batch * context, steps ~ tokens^a * context^d: d is that difference, with an error
    of its own, as the errors of two exponents from the same rows are not independent.
    """
    plane = plane.assign(step_tokens=plane["batch"] * plane["context"])
    by_batch, by_context = exponents(plane, "batch", "context")
    return by_batch, by_context, exponents(plane, "step_tokens", "context")[1]


def pythia_tokens(models: pd.DataFrame) -> dict[str, int]:
    """For each size of Pythia: tokens seen at its first revision with an induction head."""
    found: dict[str, int] = {}
    for name, best in zip(models.get("name", []), models.get("best_induction", []), strict=True):
        if (match := PYTHIA.fullmatch(name)) and best >= 0.4:
            size, tokens = name.partition("@")[0], int(match[1]) * PYTHIA_BATCH
            found[size] = min(tokens, found.get(size, tokens))
    return found


def _at_centre(toys: pd.DataFrame, *free: str) -> pd.Series:
    """Where every factor but the free ones is the centre's."""
    fixed = {name: value for name, value in CENTRE.items() if name not in free}
    return toys[list(fixed)].eq(pd.Series(fixed)).all(axis=1)


def _over_settings(rows: pd.DataFrame, column: str) -> Estimate:
    settings = rows.groupby(["n_layers", "n_heads", "d_model"]).ngroup()
    values, clusters = _tensor(rows, column), torch.tensor(settings.to_numpy(), dtype=torch.int64)
    known = len(values) and values.isfinite().all()
    return estimate(values, clusters=clusters) if known else Estimate(math.nan, math.nan, 0)


def _deviation(sized: pd.DataFrame) -> float:
    """Of a size's mean score from the centre's, as a share of it: the largest."""
    means = sized.groupby(["n_layers", "n_heads", "d_model"])["final_icl"].mean()
    centre = means.get((CENTRE["n_layers"], CENTRE["n_heads"], CENTRE["d_model"]), math.nan)
    return float(((means - centre) / centre).abs().max()) if len(means) > 1 else math.nan


def _predicted(plane: pd.DataFrame) -> tuple[Estimate, int]:
    """The share that the law predicts of settings left out, over seeds, and how many settings."""
    formed = plane[plane["formed"].astype(bool)]
    settings = formed.groupby(["batch", "context"]).ngroup()
    shares = []
    for _, rows in formed.groupby("seed"):
        factors = {name: _tensor(rows, name) for name in ("batch", "context")}
        held_out = torch.tensor(settings[rows.index].to_numpy()).long()
        try:
            shares.append(held_out_share(factors, _tensor(rows, "emergence_step"), held_out))
        except ValueError:  # too few rows
            continue
    known = estimate(torch.tensor(shares)) if shares else Estimate(math.nan, math.nan, 0)
    return known, settings.nunique()


def _tensor(rows: pd.DataFrame, column: str) -> Tensor:
    return torch.tensor(rows[column].to_numpy(dtype=float), dtype=torch.float64)
