"""Node attribution adds up to what the heads do; it and the searches find a planted circuit."""

from functools import partial

import planted
import pytest
import torch

from utils import circuit as c
from utils.ablation import mean_run
from utils.edits import Run
from utils.heads import Head
from utils.ioi import ioi_prompts
from utils.metrics import logit_diff
from utils.selection import (
    backward_search,
    distance,
    each_added,
    each_removed,
    forward_search,
    named_nodes,
    node_attribution,
    worst_set,
)

pytestmark = pytest.mark.usefixtures("no_grad")


def setting(model, prompts, others):
    means = c.means_run(prompts, c.abc_means(model, others))
    whole = logit_diff(model(prompts.tokens)[:, -1:], prompts.answers)
    return means, whole - c.run_circuit(model, prompts, means, set())


def test_attributions_add_up_to_what_all_heads_do(random_gpt2, monkeypatch):
    monkeypatch.setattr("utils.selection.DIALS", 20)
    prompts = ioi_prompts(random_gpt2, 20, seed=1)  # more than a batch
    means, done = setting(random_gpt2, prompts, ioi_prompts(random_gpt2, 40, seed=2))
    found = node_attribution(random_gpt2, prompts, means)
    assert found.shape == (20, 3, prompts.tokens.shape[1], 4)
    total = found.flatten(1).sum(1)
    torch.testing.assert_close(total, done, atol=0.02 * done.abs().max().item(), rtol=0)
    assert not any(hook.fwd_hooks for hook in random_gpt2.hook_dict.values())
    assert not torch.is_grad_enabled()


def test_one_mean_may_stand_for_all_prompts(random_gpt2):
    prompts = ioi_prompts(random_gpt2, 18, seed=1)  # more than a batch
    alike = mean_run(random_gpt2, prompts.tokens)
    spread = {name: z.expand(18, *z.shape[1:]) for name, z in alike.activations.items()}
    got, want = (node_attribution(random_gpt2, prompts, m) for m in (alike, Run(spread)))
    torch.testing.assert_close(got, want)


def test_a_planted_circuit_comes_first():
    model, prompts = planted.planted_model(), planted.planted_prompts(40)
    means, _ = setting(model, prompts, planted.planted_prompts(400, seed=1))
    by_node = named_nodes(node_attribution(model, prompts, means), prompts)
    ranked = sorted(by_node, key=lambda node: -by_node[node].mean().abs())
    assert set(ranked[:3]) == c.nodes(planted.PLANTED)
    assert by_node[planted.NAME_MOVER, "END"].mean() > 0 > by_node[planted.NEGATIVE, "END"].mean()
    assert by_node[ranked[3]].mean().abs() < 0.2 * by_node[ranked[2]].mean().abs()


def test_named_nodes_are_those_of_each_prompts_own_places():
    prompts = planted.planted_prompts(6)
    attribution = torch.randn(6, 3, planted.N_POSITIONS, 4)
    by_node = named_nodes(attribution, prompts)
    assert len(by_node) == len(prompts.positions) * 12
    for (head, place), values in list(by_node.items())[::7]:
        at = prompts.positions[place]
        wanted = [attribution[i, head.layer, at[i], head.head] for i in range(6)]
        assert values.tolist() == [value.item() for value in wanted]


NODES = [(Head(1, 1), "END"), (Head(2, 0), "S2"), (Head(0, 3), "S1+1"), (Head(2, 2), "END")]


def test_a_node_more_or_less_is_that_circuit_run_alone(random_gpt2):
    prompts = ioi_prompts(random_gpt2, 12, seed=1)
    means, _ = setting(random_gpt2, prompts, ioi_prompts(random_gpt2, 40, seed=2))
    kept, rest = set(NODES[:2]), NODES[2:]
    alone = partial(c.run_circuit, random_gpt2, prompts, means)
    added = each_added(random_gpt2, prompts, means, kept, rest)
    wanted = torch.stack([alone(kept | {node}) for node in rest])
    torch.testing.assert_close(added, wanted, atol=1e-5, rtol=0)
    removed = each_removed(random_gpt2, prompts, means, kept, NODES[:2])
    wanted = torch.stack([alone(kept - {node}) for node in NODES[:2]])
    torch.testing.assert_close(removed, wanted, atol=1e-5, rtol=0)
    assert not any(hook.fwd_hooks for hook in random_gpt2.hook_dict.values())


def test_a_knock_out_of_the_model_leaves_all_else_as_it_is(random_gpt2):
    prompts = ioi_prompts(random_gpt2, 12, seed=1)
    means, _ = setting(random_gpt2, prompts, ioi_prompts(random_gpt2, 40, seed=2))
    (found,) = each_removed(random_gpt2, prompts, means, None, NODES[:1], {NODES[3]})
    gone = c.knock_out(random_gpt2, prompts, means, {NODES[0], NODES[3]})
    torch.testing.assert_close(found, c.logit_diffs(random_gpt2, prompts, [gone])[0])


def test_searches_find_the_planted_circuit_from_either_side():
    model, prompts = planted.planted_model(), planted.planted_prompts(40)
    means, _ = setting(model, prompts, planted.planted_prompts(400, seed=1))
    planted_nodes = c.nodes(planted.PLANTED)
    candidates = [*NODES[1:3], (Head(0, 0), "END"), *sorted(planted_nodes)]
    start = {(planted.S_INHIBITION, "END")}  # without which the name mover copies both names
    forward = forward_search(model, prompts, means, candidates, n_steps=2, start=start)
    assert {step.node for step in forward} | start == planted_nodes
    backward = backward_search(model, prompts, means, candidates, n_left=3)
    assert {step.node for step in backward} == set(candidates) - planted_nodes
    f_model = logit_diff(model(prompts.tokens)[:, -1:], prompts.answers)
    alone = c.run_circuit(model, prompts, means, planted_nodes)
    for step in (forward[-1], backward[-1]):
        assert step.figure == pytest.approx(distance(alone, f_model).item(), abs=1e-4)


def test_the_worst_set_begins_with_the_head_that_has_a_backup():
    model, prompts = planted.planted_model(), planted.planted_prompts(40)
    means, _ = setting(model, prompts, planted.planted_prompts(400, seed=1))
    kept = c.nodes(planted.PLANTED) - {(planted.NEGATIVE, "END")}
    steps = worst_set(model, prompts, means, kept, n_steps=5)
    assert {step.node for step in steps} == kept  # no more than there are
    f = [c.logit_diffs(model, prompts, [c.knock_out(model, prompts, means, {steps[0].node})])[0]]
    f.insert(0, c.run_circuit(model, prompts, means, kept - {steps[0].node}))
    assert steps[0].figure == pytest.approx((f[0].mean() - f[1].mean()).abs().item(), abs=1e-4)


def test_the_distance_is_a_share_of_what_the_model_does():
    f_model = torch.tensor([3.0, 5.0])
    alone = torch.tensor([[3.0, 5.0], [5.0, 5.0], [2.0, 8.0]])
    torch.testing.assert_close(distance(alone, f_model), torch.tensor([0.0, 0.25, 0.5]))
    torch.testing.assert_close(distance(-alone, -f_model), distance(alone, f_model))
    assert distance(torch.tensor([0.03, 0.05]), torch.tensor([0.01, 0.01])) == pytest.approx(3)
    with pytest.raises(ValueError, match="the mean logit difference is zero"):
        distance(alone, torch.tensor([1.0, -1.0]))
