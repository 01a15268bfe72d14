"""Node attribution adds up to what the heads do, and finds a planted circuit."""

import planted
import pytest
import torch

from utils import circuit as c
from utils.edits import Run
from utils.ioi import ioi_prompts
from utils.metrics import logit_diff
from utils.selection import named_nodes, node_attribution

pytestmark = pytest.mark.usefixtures("no_grad")


def setting(model, prompts, others):
    means = c.means_run(prompts, c.abc_means(model, others))
    whole = logit_diff(model(prompts.tokens)[:, -1:], prompts.answers)
    return means, whole - c.run_circuit(model, prompts, means, set())


def test_attributions_add_up_to_what_all_heads_do(random_gpt2):
    prompts = ioi_prompts(random_gpt2, 20, seed=1)  # more than a batch
    means, done = setting(random_gpt2, prompts, ioi_prompts(random_gpt2, 40, seed=2))
    found = node_attribution(random_gpt2, prompts, means, n_steps=20)
    assert found.shape == (20, 3, prompts.tokens.shape[1], 4)
    total = found.flatten(1).sum(1)
    torch.testing.assert_close(total, done, atol=0.02 * done.abs().max().item(), rtol=0)
    assert not any(hook.fwd_hooks for hook in random_gpt2.hook_dict.values())
    assert not torch.is_grad_enabled()


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


def test_no_steps_are_refused(random_gpt2, no_forward):
    prompts = ioi_prompts(random_gpt2, 4)
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        node_attribution(random_gpt2, prompts, Run({}), n_steps=0)
