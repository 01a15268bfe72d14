"""A known circuit, planted by hand, is recovered by the functions that the notebook uses."""

from functools import partial

import planted
import pytest
import torch
from planted import FIRST_NAME, NAME_MOVER, NEGATIVE, PLANTED, S_INHIBITION

from utils import circuit as c
from utils.attribution import head_projections
from utils.heads import all_heads, attention_patterns
from utils.metrics import estimate, logit_diff
from utils.patching import patch_heads
from utils.paths import path_patch

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    return planted.planted_model()


@pytest.fixture(scope="module")
def prompts():
    return planted.planted_prompts(40)


@pytest.fixture(scope="module")
def means(model, prompts):
    return c.means_run(prompts, c.abc_means(model, planted.planted_prompts(400, seed=1)))


@pytest.fixture(scope="module")
def whole(model, prompts):
    with torch.no_grad():
        return logit_diff(model(prompts.tokens), prompts.answers)


def path_effects(model, prompts, whole, **receivers):
    """Change of the logit difference with each head's path taken from the ABC prompts."""
    metric = partial(logit_diff, answers=prompts.answers)
    new = prompts.corrupted["abc"]
    return path_patch(model, prompts.tokens, new, metric, **receivers) - whole[:, None, None]


def test_the_planted_model_does_the_task_as_planned(model, prompts, whole):
    logits = model(prompts.tokens)[:, -1]
    assert (logits.argmax(-1) == prompts.answers[:, 0]).all()
    patterns = attention_patterns(model, prompts.tokens)[:, :, :, planted.END]
    rows = torch.arange(len(prompts.tokens))
    assert patterns[:, 1, 1, planted.S2].min() > 0.9  # S-inhibition: END to S2
    for head in (2, 0):
        assert patterns[rows, 2, head, prompts.positions["IO"]].min() > 0.7
    flipped = logit_diff(model(prompts.corrupted["s2_io"]), prompts.answers)
    assert estimate(flipped).mean == pytest.approx(-estimate(whole).mean, rel=0.2)


def test_every_role_is_found_step_by_step(model, prompts, whole):
    threshold = 0.1 * whole.mean().item()
    to_logits = path_effects(model, prompts, whole)
    found = {
        "name_mover": c.select_heads(to_logits, threshold, sign=-1),
        "negative_name_mover": c.select_heads(to_logits, threshold, sign=1),
    }
    to_queries = path_effects(
        model,
        prompts,
        whole,
        receivers=found["name_mover"],
        site="q",
        positions=prompts.positions["END"],
    )
    found["s_inhibition"] = c.select_heads(to_queries, threshold, sign=-1)
    assert found == PLANTED


def test_a_head_that_changes_sides_with_the_order_is_found_in_each_and_not_over_both(prompts):
    model = planted.planted_model(by_order=True)
    whole = logit_diff(model(prompts.tokens), prompts.answers)
    lost = -path_effects(model, prompts, whole) / whole.mean()
    in_abba, in_baba = (lost[which].mean(0)[FIRST_NAME] for which in groups_of(prompts))
    assert in_abba > 0.05 and in_baba < -0.05
    over_both = [head for sign in (1, -1) for head in c.select_heads(lost, 0.05, sign)]
    by_order = [
        head for sign in (1, -1) for head in c.select_heads(lost, 0.05, sign, prompts.is_abba)
    ]
    assert set(over_both) == {NAME_MOVER, NEGATIVE}
    assert set(by_order) == {NAME_MOVER, NEGATIVE, FIRST_NAME}


def groups_of(prompts):
    return prompts.is_abba, ~prompts.is_abba


def test_direct_attribution_finds_who_writes_the_name(model, prompts, whole):
    written = head_projections(model, prompts.tokens, all_heads(model), prompts.answers)
    written = (written[:, 0] - written[:, 1]).unflatten(1, (model.cfg.n_layers, model.cfg.n_heads))
    threshold = 0.1 * whole.mean().item()
    assert c.select_heads(written, threshold, sign=1) == [NAME_MOVER]
    assert c.select_heads(written, threshold, sign=-1) == [NEGATIVE]


def test_activation_patching_finds_what_changes_with_s2(model, prompts, whole):
    metric = partial(logit_diff, answers=prompts.answers)
    corrupted = prompts.corrupted["s2_io"]
    base = metric(model(corrupted))
    restored = patch_heads(model, prompts.tokens, corrupted, metric) - base[:, None, None]
    found = c.select_heads(restored, 0.1 * (whole - base).mean().item(), sign=1)
    assert set(found) == {S_INHIBITION, NAME_MOVER}


def test_the_planted_circuit_is_faithful_and_a_random_one_is_not(model, prompts, means, whole):
    alone = c.run_circuit(model, prompts, means, c.nodes(PLANTED))
    assert c.faithfulness(alone, whole).ratio.mean == pytest.approx(1, abs=0.15)
    for circuit in c.random_circuits(model, PLANTED, n_draws=5):
        random = c.run_circuit(model, prompts, means, c.nodes(circuit))
        assert abs(c.faithfulness(random, whole).ratio.mean) < 0.1


def test_a_circuit_without_the_s_inhibition_head_is_not_faithful(model, prompts, means, whole):
    lacking = {role: heads for role, heads in PLANTED.items() if role != "s_inhibition"}
    alone = c.run_circuit(model, prompts, means, c.nodes(lacking))
    assert c.faithfulness(alone, whole).ratio.mean < 0


def test_the_planted_circuit_is_complete_and_minimal(model, prompts, means, whole):
    scale = whole.mean().item()
    for in_circuit, in_model in c.completeness(model, prompts, means, PLANTED).values():
        assert estimate(in_circuit).mean == pytest.approx(estimate(in_model).mean, abs=0.3 * scale)
    changes = c.minimality(model, prompts, means, PLANTED)
    assert set(changes) == c.nodes(PLANTED)
    signs = {S_INHIBITION: 1, NAME_MOVER: 1, NEGATIVE: -1}
    for (head, _), change in changes.items():
        assert signs[head] * change.mean() > 0.2 * scale
