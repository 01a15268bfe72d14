"""What would go on in silence with other figures: states of a model, and shapes that fit."""

import json
import math
import os
from pathlib import Path

import planted
import pytest
import torch
from test_circuit import random_prompts

from utils import circuit as c
from utils.edits import Run, heads_from, record, sweep
from utils.engine.readout import check_metric
from utils.metrics import LogitDiff, TokenLoss, logit_diff
from utils.models import load_hf, load_model, model_label
from utils.patching import patch_heads
from utils.power_law import PowerLaw
from utils.selection import node_attribution
from utils.session.colab import set_up
from utils.toy import build_toy, plateaus, share_formed
from utils.weights import ov_weights

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = planted.planted_prompts(6)


@pytest.fixture
def model():
    return planted.planted_model()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.blocks[0].train(), "in training mode: call model.eval"),
        (lambda model: model.blocks[1].half(), "in torch.float16, too coarse"),
        (lambda model: model.blocks[0].attn.bfloat16(), "in torch.bfloat16, too coarse"),
    ],
)
def test_a_part_of_the_model_in_a_wrong_state_is_refused(model, spoil, message):
    spoil(model)
    with pytest.raises(ValueError, match=message):
        ov_weights(model, [(1, 0)])
    with pytest.raises(ValueError, match=message):
        sweep(model, PROMPTS.tokens, LogitDiff(PROMPTS.answers), [[]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_also_when_they_become_so(model, bad):
    ov_weights(model, [(1, 0)])  # finite: that is kept in mind
    model.blocks[1].attn.W_O[0, 0, 0] = bad
    for call in (
        lambda: ov_weights(model, [(1, 0)]),
        lambda: sweep(model, PROMPTS.tokens, LogitDiff(PROMPTS.answers), [[]]),
    ):
        with pytest.raises(ValueError, match="of its weights are nan or infinite, such as "):
            call()


def test_autocast_is_refused(model):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"under torch\."):
        sweep(model, PROMPTS.tokens, LogitDiff(PROMPTS.answers), [[]])


@pytest.mark.parametrize("options", [{"fold_ln": False}, {"no_processing": True}])
def test_compatibility_without_folding_is_refused(options):
    model = build_toy(2).eval()
    model.blocks[0].ln1.original_component.weight[0] = 1.5
    model.enable_compatibility_mode(**options)
    with pytest.raises(ValueError, match="must be in compatibility mode"):
        ov_weights(model, [(0, 0)])


@pytest.mark.parametrize(
    ("metric", "read", "message"),
    [
        (LogitDiff(PROMPTS.answers[:1]), [3], "answers are for 1 prompts, this run has 6"),
        (TokenLoss(PROMPTS.tokens[:1, :2]), [3, 4], "targets are for 1 prompts, this run has 6"),
        (TokenLoss(PROMPTS.tokens[:, :1]), [3, 4], "for 1 positions of a prompt, this run reads 2"),
        (TokenLoss(PROMPTS.tokens[:, :2] + 99), [3, 4], r"targets must lie in 0\.\.12"),
        (TokenLoss(PROMPTS.tokens[:, :2]), None, "for 2 positions of a prompt, this run reads 1"),
    ],
)
def test_targets_are_not_broadcast(model, metric, read, message):
    with pytest.raises(ValueError, match=message):
        sweep(model, PROMPTS.tokens, metric, [[]], read=read)


def test_answers_may_be_of_any_whole_number_type(model):
    wide, narrow = (
        sweep(model, PROMPTS.tokens, LogitDiff(PROMPTS.answers.to(dtype)), [[]])
        for dtype in (torch.int64, torch.int32)
    )
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda logits: logits[..., 3].nanmean(1), "reads other positions than the last"),
        (lambda logits: logits.sum((1, 2)), "reads other positions than the last"),
        (lambda logits: logits[:, -1].argmax(-1), "must give floating-point values, got torch.int"),
        (lambda logits: logits[:, -1, 0] > 0, "must give floating-point values, got torch.bool"),
        (lambda logits: {}["a"], "metric fails on logits .*'a'"),
    ],
)
def test_a_metric_is_of_the_last_position_and_floating_point(metric, message):
    with pytest.raises(ValueError, match=message):
        check_metric(metric, 6, 13, torch.device("cpu"))


MIXED = {
    "less the mean": lambda logits: logits[:, -1, 0] - logits[:, -1, 0].mean(),
    "less the first": lambda logits: logits[:, -1, 0] - logits[0, -1, 0],
    "less the second": lambda logits: logits[:, -1, 0] - logits[1, -1, 0],
    "less the next": lambda logits: logits[:, -1, 0] - logits[:, -1, 0].roll(1),
    "a share": lambda logits: logits[:, -1, 0].softmax(0),
    "the highest": lambda logits: logits[:, -1, 0].max() - logits[:, -1, 1],
    "the lowest": lambda logits: logits[:, -1, 1] - logits[:, -1, 0].min(),
    "checked": lambda logits: (d := logit_diff(logits[:, -1:], PROMPTS.answers)) - d.mean(),
}


@pytest.mark.parametrize("read", [None, [2, 3]])
@pytest.mark.parametrize("metric", MIXED.values(), ids=MIXED)
def test_a_metric_that_mixes_prompts_is_refused(model, metric, read, no_forward):
    with pytest.raises(ValueError, match="metric mixes prompts"):
        sweep(model, PROMPTS.tokens, metric, [[]], read=read)


def test_what_each_prompt_says_by_itself_is_no_mixture():
    for metric in (
        lambda logits: logits[:, -1].softmax(-1)[:, 3],
        lambda logits: logit_diff(logits, PROMPTS.answers),
        lambda logits: (logits[:, -1].argmax(-1) == 3).float(),
        lambda logits: logits[:, -1].topk(3).values.mean(-1),
    ):
        check_metric(metric, 6, 13, torch.device("cpu"))


def patch(model, run):
    edits = heads_from(model, [(0, 1), (1, 1)], run)
    return sweep(model, PROMPTS.corrupted["abc"], LogitDiff(PROMPTS.answers), [edits])


def test_a_recorded_run_that_was_changed_is_refused(model):
    tokens = PROMPTS.tokens.clone()
    run = record(model, tokens, ["z"])
    want = patch(model, run)
    tokens[:] = 1  # the run keeps its own
    torch.testing.assert_close(patch(model, run), want)
    next(iter(run.activations.values()))[:] = 0
    with pytest.raises(ValueError, match=r"changed after it was recorded: give Run\(activations\)"):
        patch(model, run)
    patch(model, Run(run.activations))  # of no known prompts, as it now is


@pytest.mark.parametrize("axis", [3, 4])  # one head, one number of it
@pytest.mark.parametrize("run", [lambda *on: c.run_circuit(*on, set()), node_attribution])
def test_means_do_not_stand_for_all_heads_or_all_their_numbers(model, axis, run, no_forward):
    means = torch.zeros(4, 3, PROMPTS.tokens.shape[1], 4, 16).narrow(axis, 0, 1)
    with pytest.raises(ValueError, match=r"source of the edit at blocks\.0\..* is for \[6, "):
        run(model, PROMPTS, c.means_run(PROMPTS, means))


@pytest.mark.parametrize(
    "corrupted", [{}, {"abc": None}, {"abc": PROMPTS.tokens[:3]}, {"abc": PROMPTS.tokens.tolist()}]
)
def test_abc_prompts_are_one_for_each_prompt(model, corrupted, no_forward):
    with pytest.raises(ValueError, match=r"prompts\.corrupted must have 'abc' prompts of shape"):
        c.abc_means(model, PROMPTS._replace(corrupted=corrupted))


def test_a_path_is_a_folder_and_never_a_name(random_gpt2_folder, monkeypatch):
    assert model_label(load_model(random_gpt2_folder, device="cpu")) == "random-gpt2"
    monkeypatch.chdir(random_gpt2_folder.parent)
    assert load_hf(Path("random-gpt2"))[1].source == "local folder random-gpt2"
    for name in ("gpt2-small", "owner/name"):  # nothing is asked of a hub
        with pytest.raises(ValueError, match=rf"name='\..*{name[-4:]}' is no model"):
            load_hf(Path(name))


def test_another_project_is_no_folder_to_work_in():
    here = os.getcwd()
    with pytest.raises(ValueError, match=r"project: got 'project-9', want one of project-1-"):
        set_up("project-9")
    assert os.getcwd() == here


@pytest.mark.parametrize("template", [PROMPTS.template[:1], PROMPTS.template - 1])
def test_templates_are_one_for_each_prompt_and_not_negative(template):
    with pytest.raises(ValueError, match=r"prompts\.template must "):
        c.means_run(PROMPTS._replace(template=template), torch.zeros(1, 3, 7, 4, 16))


def test_shares_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"mean F\(M\) is 0"):
        c.gap_by_prompt({"none": (torch.ones(2), torch.tensor([1.0, -1.0]))})
    steps, values = torch.arange(0, 101, 10), (torch.arange(11) > 8).float()
    with pytest.raises(ValueError, match=r"must meet the training, 0\.\.100"):
        share_formed(steps, values, 1e6, 10)
    with pytest.raises(ValueError, match="do not change in the window"):
        plateaus(steps, values, 30, 20)
    with pytest.raises(ValueError, match="want a positive number for each of a"):
        PowerLaw(1.0, {"a": None}, {}).at({"a": math.nan})


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_figures_do_not_depend_on_the_number_of_threads(random_gpt2, n_threads):
    """Within 1e-5 of the logit difference, far below any error that a verdict looks at."""
    prompts = random_prompts(high=1000)
    pair = prompts.corrupted["abc"], prompts.tokens
    expected = patch_heads(random_gpt2, *pair, LogitDiff(prompts.answers))
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found = patch_heads(random_gpt2, *pair, LogitDiff(prompts.answers))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_configuration_with_fewer_layers_than_the_weights_is_refused(
    random_gpt2_folder, tmp_path
):
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in random_gpt2_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["n_layer"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"configuration has 2 layers, its weights have .*h\.2\."):
        load_model(str(folder))
