"""Circuits against forward hooks on the untouched Hugging Face model, and against plain loops."""

import math
from itertools import product

import pytest
import references
import torch

from utils import circuit as c
from utils.heads import Head, all_heads
from utils.ioi import IOIPrompts
from utils.metrics import logit_diff

CLOSE = {"atol": 2e-3, "rtol": 1e-3}
N_POSITIONS = 7
pytestmark = pytest.mark.usefixtures("no_grad")

# two heads of a role in one layer, two layers of a role, and a head at two positions
CIRCUIT = {
    "previous_token": [Head(0, 1)],
    "induction": [Head(1, 0), Head(1, 2)],
    "name_mover": [Head(1, 2), Head(2, 3)],
}


def run_knockout(model, prompts, means, removed):
    """F(M - K)."""
    return c.logit_diffs(model, prompts, [c.knock_out(model, prompts, means, removed)])[0]


def random_prompts(n_prompts=4, seed=0, high=1000):
    """Random tokens with positions that differ from prompt to prompt, and two templates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    tokens = draw(1, high, n_prompts, N_POSITIONS)
    return IOIPrompts(
        tokens=tokens,
        answers=draw(1, high, n_prompts, 2),
        positions={
            "S1+1": draw(1, 4, n_prompts),
            "S2": draw(4, 6, n_prompts),
            "END": torch.full((n_prompts,), N_POSITIONS - 1),
        },
        template=torch.arange(n_prompts) % 2,
        is_abba=torch.arange(n_prompts) % 2 == 0,
        corrupted={"abc": draw(1, high, n_prompts, N_POSITIONS)},
    )


class Reference:
    """The same ablations on the Hugging Face model, one prompt at a time, node by node."""

    def __init__(self, hf, prompts, means_from):
        self.hf, self.prompts = hf, prompts
        z = [references.recorded(hf, row[None])[0] for row in means_from.corrupted["abc"]]
        self.means = {}  # of a template: [layer pos head d_head]
        for t in set(means_from.template.tolist()):
            rows = [z[i] for i in range(len(z)) if means_from.template[i] == t]
            self.means[t] = sum(rows) / len(rows)

    def logit_diffs(self, ablate):
        """`ablate(layer, head, names of a position)` says what to replace."""
        values = []
        for i, row in enumerate(self.prompts.tokens):
            at = {name: int(p[i]) for name, p in self.prompts.positions.items()}
            mean = self.means[int(self.prompts.template[i])]

            def edit(layer, z, at=at, mean=mean):
                for pos, head in product(range(N_POSITIONS), range(z.shape[2])):
                    if ablate(layer, head, [name for name, p in at.items() if p == pos]):
                        z[:, pos, head] = mean[layer, pos, head]
                return z

            logits = references.run(self.hf, row[None], edit)[0, -1]
            right, wrong = self.prompts.answers[i]
            values.append(logits[right] - logits[wrong])
        return torch.stack(values)

    def circuit(self, kept):
        return self.logit_diffs(
            lambda layer, head, names: not any(((layer, head), n) in kept for n in names)
        )

    def knockout(self, removed):
        return self.logit_diffs(
            lambda layer, head, names: any(((layer, head), n) in removed for n in names)
        )


def means_for(model, prompts, means_from):
    return c.means_run(prompts, c.abc_means(model, means_from))


@pytest.fixture(scope="module")
def gpt2_case(random_gpt2, random_gpt2_hf):
    with torch.no_grad():
        prompts, more = random_prompts(), random_prompts(6, seed=1)
        reference = Reference(random_gpt2_hf, prompts, more)
        return random_gpt2, prompts, means_for(random_gpt2, prompts, more), reference


def every_node(model, prompts):
    """Every head at every position, as nodes; and the prompts that know these positions."""
    positions = {str(i): torch.full_like(prompts.positions["END"], i) for i in range(N_POSITIONS)}
    nodes = {(head, name) for head in all_heads(model) for name in positions}
    return nodes, prompts._replace(positions=positions)


def full(model, prompts):
    return logit_diff(model(prompts.tokens), prompts.answers)


# Running circuits


def test_circuit_and_knockout_equal_hugging_face_hooks(model_pair):
    model, hf = model_pair
    prompts, more = random_prompts(), random_prompts(6, seed=1)
    means, reference = means_for(model, prompts, more), Reference(hf, prompts, more)
    nodes = c.nodes(CIRCUIT)
    got = c.run_circuit(model, prompts, means, nodes)
    torch.testing.assert_close(got, reference.circuit(nodes), **CLOSE)
    got = run_knockout(model, prompts, means, nodes)
    torch.testing.assert_close(got, reference.knockout(nodes), **CLOSE)


def test_ablating_nothing_gives_the_full_model(model_pair):
    model, _ = model_pair
    prompts = random_prompts()
    means, whole = means_for(model, prompts, prompts), full(model, prompts)
    torch.testing.assert_close(run_knockout(model, prompts, means, set()), whole, **CLOSE)
    everything, named = every_node(model, prompts)
    alone = c.run_circuit(model, named, means, everything)
    torch.testing.assert_close(alone, whole, **CLOSE)
    assert c.faithfulness(alone, whole).ratio.mean == pytest.approx(1, abs=1e-3)


def test_an_empty_circuit_is_the_model_with_every_node_knocked_out(gpt2_case):
    model, prompts, means, reference = gpt2_case
    nothing = c.run_circuit(model, prompts, means, set())
    torch.testing.assert_close(nothing, reference.circuit(set()), **CLOSE)
    everything, named = every_node(model, prompts)
    torch.testing.assert_close(run_knockout(model, named, means, everything), nothing, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "neox", "toy2"])
def test_other_architectures_equal_plain_hooks(name, request):
    model = request.getfixturevalue(name)
    prompts = random_prompts(high=model.cfg.d_vocab)
    means = c.abc_means(model, prompts)
    kept = set(map(c.Node.from_label, ("L0H1 S1+1", "L1H2 END", "L1H0 S2")))

    def replace(z, hook):
        layer, new = hook.layer(), z.clone()
        for i, pos, head in product(range(len(z)), range(N_POSITIONS), range(z.shape[2])):
            names = [n for n, p in prompts.positions.items() if p[i] == pos]
            if not any(((layer, head), n) in kept for n in names):
                new[i, pos, head] = means[prompts.template[i], layer, pos, head]
        return new

    hooks = [(f"blocks.{layer}.attn.hook_z", replace) for layer in range(model.cfg.n_layers)]
    want = logit_diff(model.run_with_hooks(prompts.tokens, fwd_hooks=hooks), prompts.answers)
    got = c.run_circuit(model, prompts, c.means_run(prompts, means), kept)
    torch.testing.assert_close(got, want, **CLOSE)


def test_means_are_the_same_in_small_batches(gpt2_case, monkeypatch):
    model, prompts, means, _ = gpt2_case
    monkeypatch.setattr("utils.metrics.MAX_LOGITS", 1)  # one prompt at a time
    again = means_for(model, prompts, random_prompts(6, seed=1))
    for name, values in means.activations.items():
        torch.testing.assert_close(again.activations[name], values, **CLOSE)


# Completeness and minimality


def test_completeness_knocks_the_same_nodes_out_of_both(gpt2_case):
    model, prompts, means, reference = gpt2_case
    kept = c.nodes(CIRCUIT)
    result = c.completeness(model, prompts, means, CIRCUIT)
    assert list(result) == ["none", *CIRCUIT]
    for role, (in_circuit, in_model) in result.items():
        group = set() if role == "none" else c.nodes({role: CIRCUIT[role]})
        torch.testing.assert_close(in_circuit, reference.circuit(kept - group), **CLOSE)
        torch.testing.assert_close(in_model, reference.knockout(group), **CLOSE)


def test_minimality_is_compared_on_the_prompts_that_are_given(gpt2_case):
    model, prompts, means, _ = gpt2_case
    each = torch.eye(len(prompts.tokens), dtype=torch.bool)
    by_one = [c.minimality(model, prompts, means, CIRCUIT, choose=one) for one in each]
    for node in by_one[0]:
        found = torch.stack([changes[node] for changes in by_one])  # [chosen on, prompt]
        assert torch.equal(found.diag().abs(), found.abs().amax(0))


def test_minimality_takes_the_larger_of_the_two_changes(gpt2_case):
    model, prompts, means, reference = gpt2_case
    kept = c.nodes(CIRCUIT)
    result = c.minimality(model, prompts, means, CIRCUIT)
    assert set(result) == kept
    used = set()
    for role, heads in CIRCUIT.items():
        group = c.nodes({role: heads})
        for head in heads:
            v = (head, c.ROLE_POSITIONS[role])
            changes = {}
            for k in (frozenset(), frozenset(group - {v})):
                changes[k] = reference.circuit(kept - k) - reference.circuit(kept - k - {v})
            k = max(changes, key=lambda k: abs(changes[k].mean()))
            used.add(bool(k))
            torch.testing.assert_close(result[v], changes[k], **CLOSE)
    assert used == {False, True}  # both kinds of K were put to the test


# Faithfulness


def test_faithfulness_is_the_ratio_of_the_means():
    circuit, model = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0, 4.0, 6.0])
    result = c.faithfulness(circuit, model)
    assert result.ratio.mean == pytest.approx(0.5)
    assert result.gap.mean == pytest.approx(2.0)
    # F(C) - r F(M) is 0, 1, -1: standard deviation 1, over sqrt(3) and the mean of F(M)
    assert result.ratio.stderr == pytest.approx(1 / math.sqrt(3) / 4)
    assert c.faithfulness(model, circuit).gap.mean == pytest.approx(2.0)


def test_faithfulness_error_agrees_with_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    model = 3 + torch.randn(200, generator=generator)
    circuit = 0.8 * model + 0.5 * torch.randn(200, generator=generator)
    rows = torch.randint(200, (4000, 200), generator=generator)
    ratios = circuit[rows].mean(1) / model[rows].mean(1)
    assert c.faithfulness(circuit, model).ratio.stderr == pytest.approx(
        ratios.std().item(), rel=0.1
    )


# Circuits as data


def test_a_head_in_two_roles_is_two_nodes():
    assert len(c.nodes(CIRCUIT)) == 5
    assert {(Head(1, 2), "S2"), (Head(1, 2), "END")} <= c.nodes(CIRCUIT)


def test_select_heads_by_sign_size_and_error():
    effects = torch.zeros(4, 2, 3)
    effects[:, 0, 1] = torch.tensor([0.9, 1.0, 1.1, 1.0])
    effects[:, 1, 2] = torch.tensor([1.9, 2.0, 2.1, 2.0])
    effects[:, 0, 0] = torch.tensor([-8.0, 0.0, 8.0, 6.0])  # large, but as large an error
    effects[:, 1, 0] = torch.tensor([-1.0, -1.1, -0.9, -1.0])
    effects[:, 1, 1] = torch.tensor([0.19, 0.2, 0.21, 0.2])
    assert c.select_heads(effects, 0.5, sign=1) == [Head(1, 2), Head(0, 1)]
    assert c.select_heads(effects, 0.1, sign=1) == [Head(1, 2), Head(0, 1), Head(1, 1)]
    assert c.select_heads(effects, 0.5, sign=-1) == [Head(1, 0)]
    assert c.select_heads(effects, 3.0, sign=1) == []


def test_heads_whose_effects_cancel_over_all_prompts_are_found_in_their_group():
    noise = 0.05 * torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0))
    effects, abba = noise, torch.arange(40) % 2 == 0
    effects[:, 0, 0] += 1.0  # in both
    effects[:, 0, 1] += torch.where(abba, 2.0, -2.1)  # cancels
    effects[abba, 1, 2] -= 0.5  # in one alone
    assert c.select_heads(effects, 0.1, 1) == [Head(0, 0)]
    assert c.select_heads(effects, 0.1, 1, abba) == [Head(0, 0)]
    assert c.select_heads(effects, 0.1, -1, abba) == [Head(0, 1), Head(1, 2)]
    assert c.select_heads(-effects, 0.1, 1, abba) == [Head(0, 1), Head(1, 2)]


def test_signs_turned_at_random_are_selected_no_more_often_than_three_errors_promise():
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(60, 30, 30, generator=generator)
    effects *= torch.randint(0, 2, effects.shape, generator=generator) * 2 - 1
    assert len(c.select_heads(effects, 0.0, 1)) <= 5  # of 900, one in 740 expected
    in_two_orders = [
        h for s in (1, -1) for h in c.select_heads(effects, 0.0, s, torch.arange(60) % 2 == 0)
    ]
    # 30 prompts in each, two signs: Student's t passes 3 once in 360, so ten are expected of 3,600
    assert len(in_two_orders) <= 19


def test_random_circuits_have_the_same_size_and_other_heads(random_gpt2):
    draws = c.random_circuits(random_gpt2, CIRCUIT, n_draws=20)
    taken = {head for heads in CIRCUIT.values() for head in heads}
    for draw in draws:
        assert {role: len(h) for role, h in draw.items()} == {r: len(h) for r, h in CIRCUIT.items()}
        heads = [head for part in draw.values() for head in part]
        assert len(set(heads)) == len(heads)
        assert not set(heads) & taken
    drawn = {head for draw in draws for part in draw.values() for head in part}
    assert drawn == set(all_heads(random_gpt2)) - taken  # every other head can be drawn
    assert draws == c.random_circuits(random_gpt2, CIRCUIT, n_draws=20)


# Bad input


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("run", [c.run_circuit, run_knockout])
def test_bad_input_to_a_run_is_refused(random_gpt2, run):
    prompts, means = random_prompts(), torch.zeros(2, 3, N_POSITIONS, 4, 16)
    fitting = c.means_run(prompts, means)
    for node, message in (
        (c.Node(Head(9, 0), "END"), "no head L9H0 at 'z': 3 layers"),
        (c.Node(Head(0, 0), "S3"), "no position 'S3', prompts have"),
    ):
        with pytest.raises(ValueError, match=message):
            run(random_gpt2, prompts, fitting, {node})
    shorter = c.means_run(prompts, means[..., :-1])
    with pytest.raises(ValueError, match=r"source of .* is for \[4, 7, 4, 15\]"):
        run(random_gpt2, prompts, shorter, c.nodes(CIRCUIT))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: c.random_circuits(m, {"induction": all_heads(m)[:7]}, n_draws=1),
            "circuit has 7 heads, the model only 5 others",
        ),
        (lambda m: c.nodes({"helper": [Head(0, 0)]}), "role 'helper' has no position"),
        (lambda m: c.select_heads(torch.zeros(1, 2, 2), 0.1, 1), "2 or more prompts"),
        (lambda m: c.select_heads(torch.zeros(2, 2, 2), -0.1, 1), "must not be negative"),
        (lambda m: c.faithfulness(torch.ones(2), torch.ones(3)), "f_model must be .* prompt=2"),
        (lambda m: c.faithfulness(torch.ones(2), torch.zeros(2)), "mean logit difference is zero"),
        (
            lambda m: c.means_run(random_prompts(), torch.zeros(2, 3, 6, 4, 16)),
            "means are for 6 positions, prompts have 7",
        ),
        (
            lambda m: c.means_run(random_prompts(), torch.zeros(1, 3, 7, 4, 16)),
            r"means lacks template \[1\]",
        ),
        (
            lambda m: c.means_run(random_prompts(), torch.full((2, 3, 7, 4, 16), math.nan)),
            r"means lacks template \[0, 1\]",
        ),
    ],
)
def test_bad_input_to_the_figures_is_refused(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


def test_nodes_are_read_from_their_labels():
    for place in ("IO", "S1", "S1+1", "S2", "END"):
        assert c.Node.from_label(str(c.Node(Head(5, 11), place))) == (Head(5, 11), place)
    for wrong in ("L5H1", "5.1 END", "L5H1 end", "L5Hx S2", "LH S2", "L5H1H2 S2"):
        with pytest.raises(ValueError, match="label: got"):
            c.Node.from_label(wrong)
