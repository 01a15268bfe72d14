"""Circuits against forward hooks on the untouched Hugging Face model, and against plain loops."""

import math
from contextlib import ExitStack
from itertools import product

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from utils import circuit as c
from utils import masks
from utils.heads import Head, all_heads
from utils.ioi import IOIPrompts
from utils.metrics import last_position_hooks, logit_diff
from utils.models import load_model

CLOSE = {"atol": 2e-3, "rtol": 1e-3}
N_POSITIONS = 7
pytestmark = pytest.mark.usefixtures("no_grad")

# two heads of a role in one layer, two layers of a role, and a head at two positions
CIRCUIT = {
    "previous_token": [Head(0, 1)],
    "induction": [Head(1, 0), Head(1, 2)],
    "name_mover": [Head(1, 2), Head(2, 3)],
}


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
    """The same ablations on the Hugging Face model, one prompt at a time, head by head."""

    def __init__(self, hf, prompts, means_from):
        self.hf, self.prompts = hf, prompts
        blocks = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers
        self.outputs = [b.attn.c_proj if hasattr(b, "attn") else b.self_attn.o_proj for b in blocks]
        self.n_heads = hf.config.num_attention_heads
        z = [self.z(row) for row in means_from.corrupted["abc"]]
        self.means = {}
        for t in set(means_from.template.tolist()):
            rows = [z[i] for i in range(len(z)) if means_from.template[i] == t]
            self.means[t] = [sum(layers) / len(rows) for layers in zip(*rows, strict=True)]

    def run(self, row, hook_for):
        with ExitStack() as stack:
            for layer, output in enumerate(self.outputs):
                stack.callback(output.register_forward_pre_hook(hook_for(layer)).remove)
            return self.hf(row[None]).logits[0, -1]

    def z(self, row):
        kept = {}

        def hook_for(layer):
            def keep(module, args):
                kept[layer] = args[0].clone()

            return keep

        self.run(row, hook_for)
        return [kept[layer] for layer in range(len(self.outputs))]

    def logit_diffs(self, ablate):
        """`ablate(layer, head, position, names of that position)` says what to replace."""
        values = []
        for i, row in enumerate(self.prompts.tokens):
            at = {name: int(p[i]) for name, p in self.prompts.positions.items()}
            mean = self.means[int(self.prompts.template[i])]

            def hook_for(layer, at=at, mean=mean):
                def replace(module, args):
                    z = args[0].unflatten(-1, (self.n_heads, -1)).clone()
                    new = mean[layer].unflatten(-1, (self.n_heads, -1))
                    for pos in range(N_POSITIONS):
                        names = [name for name, p in at.items() if p == pos]
                        for head in range(self.n_heads):
                            if ablate(layer, head, names):
                                z[:, pos, head] = new[:, pos, head]
                    return (z.flatten(-2),)

                return replace

            logits = self.run(row, hook_for)
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


@pytest.fixture(scope="module")
def gpt2_case(random_gpt2, random_gpt2_hf):
    with torch.no_grad():
        prompts, more = random_prompts(), random_prompts(6, seed=1)
        reference = Reference(random_gpt2_hf, prompts, more)
        return random_gpt2, prompts, c.abc_means(random_gpt2, more), reference


def full(model, prompts):
    logits = model.run_with_hooks(prompts.tokens, fwd_hooks=last_position_hooks())
    return logit_diff(logits, prompts.answers)


def every_node(model, prompts):
    """Every head at every position, as nodes; and the prompts that know these positions."""
    positions = {str(i): torch.full_like(prompts.positions["END"], i) for i in range(N_POSITIONS)}
    nodes = {(head, name) for head in all_heads(model) for name in positions}
    return nodes, prompts._replace(positions=positions)


@pytest.fixture(scope="module")
def neox(smollm2, tmp_path_factory):
    """A random model with attention and MLP in parallel, and partly rotary positions."""
    config = GPTNeoXConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        initializer_range=0.2,
        vocab_size=smollm2.cfg.d_vocab,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random") / "random-neox"
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


# Running circuits


def test_circuit_and_knockout_equal_hugging_face_hooks(model_pair):
    model, hf = model_pair
    prompts = random_prompts()
    more = random_prompts(6, seed=1)
    means = c.abc_means(model, more)
    reference = Reference(hf, prompts, more)
    nodes = c.nodes(CIRCUIT)
    torch.testing.assert_close(
        c.run_circuit(model, prompts, means, nodes), reference.circuit(nodes), **CLOSE
    )
    torch.testing.assert_close(
        c.run_knockout(model, prompts, means, nodes), reference.knockout(nodes), **CLOSE
    )


def test_ablating_nothing_gives_the_full_model(model_pair):
    model, _ = model_pair
    prompts = random_prompts()
    means = c.abc_means(model, prompts)
    whole = full(model, prompts)
    torch.testing.assert_close(c.run_knockout(model, prompts, means, set()), whole, **CLOSE)
    everything, named = every_node(model, prompts)
    alone = c.run_circuit(model, named, means, everything)
    torch.testing.assert_close(alone, whole, **CLOSE)
    assert c.faithfulness(alone, whole).ratio.mean == pytest.approx(1, abs=1e-3)


def test_an_empty_circuit_is_the_model_with_every_node_knocked_out(gpt2_case):
    model, prompts, means, reference = gpt2_case
    nothing = c.run_circuit(model, prompts, means, set())
    torch.testing.assert_close(nothing, reference.circuit(set()), **CLOSE)
    everything, named = every_node(model, prompts)
    torch.testing.assert_close(c.run_knockout(model, named, means, everything), nothing, **CLOSE)


@pytest.mark.parametrize("name", ["neox", "toy2"])
def test_other_architectures_equal_plain_hooks(name, request):
    model = request.getfixturevalue(name)
    prompts = random_prompts(high=model.cfg.d_vocab)
    means = c.abc_means(model, prompts)
    kept = {(Head(0, 1), "S1+1"), (Head(1, 2), "END"), (Head(1, 0), "S2")}

    def replace(z, hook):
        layer, new = hook.layer(), z.clone()
        for i, pos, head in product(range(len(z)), range(N_POSITIONS), range(z.shape[2])):
            names = [n for n, p in prompts.positions.items() if p[i] == pos]
            if not any(((layer, head), n) in kept for n in names):
                new[i, pos, head] = means[prompts.template[i], layer, pos, head]
        return new

    hooks = [(f"blocks.{layer}.attn.hook_z", replace) for layer in range(model.cfg.n_layers)]
    want = logit_diff(model.run_with_hooks(prompts.tokens, fwd_hooks=hooks), prompts.answers)
    torch.testing.assert_close(c.run_circuit(model, prompts, means, kept), want, **CLOSE)


def test_batches_of_prompts_do_not_change_the_result(gpt2_case, monkeypatch):
    model, prompts, means, _ = gpt2_case
    nodes = c.nodes(CIRCUIT)
    at_once = c.run_circuit(model, prompts, means, nodes)
    more = random_prompts(6, seed=1)
    monkeypatch.setattr("utils.metrics.MAX_LOGITS", 1)  # one prompt at a time
    torch.testing.assert_close(c.run_circuit(model, prompts, means, nodes), at_once, **CLOSE)
    torch.testing.assert_close(c.abc_means(model, more), means, **CLOSE)


def test_packing_runs_does_not_change_the_result(gpt2_case, monkeypatch):
    model, prompts, means, _ = gpt2_case
    packed = c.minimality(model, prompts, means, CIRCUIT)
    monkeypatch.setattr("utils.masks.pack_size", lambda *_: 1)  # one mask at a time
    for node, change in c.minimality(model, prompts, means, CIRCUIT).items():
        torch.testing.assert_close(change, packed[node], **CLOSE)


def test_no_hook_is_left_after_an_error(gpt2_case):
    model, prompts, means, _ = gpt2_case
    before = full(model, prompts)
    with pytest.raises(RuntimeError):  # in a hook, on the way
        c.run_circuit(model, prompts, means[..., :-1], c.nodes(CIRCUIT))
    torch.testing.assert_close(full(model, prompts), before)


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


def test_a_role_of_your_own_gets_its_position_from_you(gpt2_case):
    model, prompts, means, reference = gpt2_case
    own, positions = {"subject_suppressor": [Head(1, 1)]}, {"subject_suppressor": "END"}
    result = c.completeness(model, prompts, means, own, positions)
    kept = {(Head(1, 1), "END")}
    torch.testing.assert_close(result["none"][0], reference.circuit(kept), **CLOSE)
    change = c.minimality(model, prompts, means, own, positions)[Head(1, 1), "END"]
    torch.testing.assert_close(change, reference.circuit(kept) - reference.circuit(set()), **CLOSE)


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


def test_the_papers_circuit():
    sizes = {role: len(heads) for role, heads in c.PAPER_CIRCUIT.items()}
    assert sum(sizes.values()) == 26 == len(c.nodes(c.PAPER_CIRCUIT))
    assert sizes["backup_name_mover"] == 8
    assert (Head(9, 9), "END") in c.nodes(c.PAPER_CIRCUIT)
    assert (Head(4, 11), "S1+1") in c.nodes(c.PAPER_CIRCUIT)


def test_a_head_in_two_roles_is_two_nodes():
    assert len(c.nodes(CIRCUIT)) == 5
    assert {(Head(1, 2), "S2"), (Head(1, 2), "END")} <= c.nodes(CIRCUIT)


def test_a_mask_that_spares_what_the_recording_ablates_is_refused(gpt2_case):
    model, prompts, means, _ = gpt2_case
    all_of_it = torch.ones(4, model.cfg.n_layers, N_POSITIONS, model.cfg.n_heads, dtype=torch.bool)
    none_of_it = torch.zeros_like(all_of_it)
    masks.masked_logit_diffs(model, prompts, means, [none_of_it, all_of_it])
    with pytest.raises(ValueError, match="every mask must ablate what the first does"):
        masks.masked_logit_diffs(model, prompts, means, [all_of_it, none_of_it])


def test_keep_mask_marks_each_prompts_own_position(random_gpt2):
    prompts = random_prompts()
    mask = c.keep_mask(random_gpt2, prompts, {(Head(2, 1), "S2"), (Head(0, 3), "END")})
    want = {(i, 2, int(p), 1) for i, p in enumerate(prompts.positions["S2"])}
    want |= {(i, 0, N_POSITIONS - 1, 3) for i in range(len(prompts.tokens))}
    assert {tuple(at) for at in mask.nonzero().tolist()} == want


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
    assert c.select_heads(effects, 0.5, sign=1, n_errors=0)[1] == Head(0, 0)
    assert c.select_heads(effects, 3.0, sign=1) == []


def test_precision_and_recall():
    found, published = (
        [Head(0, 1), Head(1, 1), (2, 2)],
        [Head(1, 1), Head(2, 2), Head(3, 3), (4, 4)],
    )
    assert c.precision_recall(found, published) == pytest.approx((2 / 3, 1 / 2))
    precision, recall = c.precision_recall([], published)
    assert math.isnan(precision)
    assert recall == 0


def test_random_circuits_have_the_same_size_and_other_heads(random_gpt2):
    draws = c.random_circuits(random_gpt2, CIRCUIT, n_draws=20, seed=3)
    taken = {head for heads in CIRCUIT.values() for head in heads}
    for draw in draws:
        assert {role: len(h) for role, h in draw.items()} == {r: len(h) for r, h in CIRCUIT.items()}
        heads = [head for part in draw.values() for head in part]
        assert len(set(heads)) == len(heads)
        assert not set(heads) & taken
    drawn = {head for draw in draws for part in draw.values() for head in part}
    assert drawn == set(all_heads(random_gpt2)) - taken  # every other head can be drawn
    assert draws == c.random_circuits(random_gpt2, CIRCUIT, n_draws=20, seed=3)
    assert draws != c.random_circuits(random_gpt2, CIRCUIT, n_draws=20, seed=4)


# Bad input


def run_with(case, **changes):
    model, prompts, means, _ = case
    arguments = {"prompts": prompts, "means": means, "kept": c.nodes(CIRCUIT)} | changes
    return c.run_circuit(model, **arguments)


def test_bad_input_to_a_run_is_refused(gpt2_case):
    _, prompts, means, _ = gpt2_case
    with pytest.raises(ValueError, match="no head L9H0 in 3 layers"):
        run_with(gpt2_case, kept={(Head(9, 0), "END")})
    with pytest.raises(ValueError, match="no position 'S3'"):
        run_with(gpt2_case, kept={(Head(0, 0), "S3")})
    with pytest.raises(ValueError, match=r"means .* and ablated .* must agree"):
        run_with(gpt2_case, means=means[:, :, :-1])
    with pytest.raises(ValueError, match=r"template must be 4 numbers in 0\.\.0"):
        run_with(gpt2_case, means=means[:1])
    one_template = prompts._replace(template=torch.full_like(prompts.template, 1))
    lacking = c.abc_means(gpt2_case[0], one_template)
    with pytest.raises(ValueError, match=r"means lacks template \[0\]"):
        run_with(gpt2_case, means=lacking)


def test_hooks_refuse_other_prompts(gpt2_case):
    model, prompts, means, _ = gpt2_case
    hooks = c.mean_ablation_mask_hooks(means, prompts.template, torch.ones(4, 3, 7, 4) > 0)
    with pytest.raises(ValueError, match="ablated is for"):
        model.run_with_hooks(prompts.tokens[:2], fwd_hooks=hooks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: c.nodes({"helper": [Head(0, 0)]}), "role 'helper' has no position"),
        (lambda: c.select_heads(torch.zeros(1, 2, 2), 0.1, 1), "2 or more prompts"),
        (lambda: c.select_heads(torch.zeros(2, 2, 2), -0.1, 1), "must not be negative"),
        (lambda: c.select_heads(torch.zeros(2, 2, 2), 0.1, 0), r"sign must be \+1 or -1"),
        (lambda: c.precision_recall([Head(0, 0)], []), "published is empty"),
        (lambda: c.faithfulness(torch.ones(2), torch.ones(3)), "circuit and model"),
        (lambda: c.faithfulness(torch.ones(2), torch.zeros(2)), "mean logit difference is zero"),
    ],
)
def test_bad_input_to_the_figures_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_to_random_circuits_is_refused(random_gpt2):
    with pytest.raises(ValueError, match="n_draws must be at least 1"):
        c.random_circuits(random_gpt2, CIRCUIT, n_draws=0)
    many = {"induction": all_heads(random_gpt2)[:7]}
    with pytest.raises(ValueError, match="circuit has 7 heads, the model only 5 others"):
        c.random_circuits(random_gpt2, many, n_draws=1)
