"""The usual wrong things, tried on every public function of `utils`.

Each ends in a ValueError or TypeError of ours, before any forward pass: it names the argument and
is short. What is tried follows from the right argument: a tensor is made a list, an int a float.
`rows` holds a right call of each function; a function without a row, or an argument that its row
leaves out, fails the test.
"""

import importlib
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from census.grid import Toy
from census.training import check_toy, sharpest_drop, train, trained
from utils.circuit import Node
from utils.edits import Run, heads_from, record
from utils.heads import Head
from utils.ioi import IOIPrompts, ioi_prompts
from utils.ledger.claims import Claim, Ledger
from utils.metrics import Estimate, LogitDiff, TokenLoss
from utils.models import load_model
from utils.toy import build_toy, tiny_model, train_toy
from utils.widgets.own_text import means_by_place, own_prompt
from utils.widgets.sliders import with_slider

ROOT = Path(__file__).parents[1]
# what nobody calls with values of their own: how figures look, what a widget draws of its runs,
# the files of a ledger, downloads, a notebook's first cell; and the checks of exercises, which take
# whatever a learner gives and say what it is (tests/test_exercises.py)
ELSEWHERE = {"__init__", "look", "typed", "controls.inputs", "sliders.show_frame"}
MODULES = [p.stem for p in ROOT.glob("utils/*.py") if p.stem not in ELSEWHERE] + ["ledger.rules"]
MODULES += ["widgets.controls", "widgets.own_text", "widgets.sliders", "models.load"]


def functions():
    for name in sorted(MODULES):
        module = importlib.import_module(f"utils.{name}")
        for function in vars(module).values():
            ours = inspect.isfunction(function) and function.__module__ == module.__name__
            key = f"{name.split('.')[-1]}.{function.__name__}" if ours else ""
            if ours and not function.__name__.startswith("_") and key not in ELSEWHERE:
                yield key, function


FUNCTIONS = dict(functions()) | {"LogitDiff": LogitDiff, "TokenLoss": TokenLoss, "Ledger": Ledger}
FUNCTIONS |= {f"Ledger.{f.__name__}": f for f in (Ledger.record, Ledger.record_heads, Ledger.table)}
FUNCTIONS |= {f"training.{f.__name__}": f for f in (check_toy, train, trained, sharpest_drop)}
# text and switches: any value of the type is right
FREE = {"desc", "distinct", "name", "per_position", "folded", "smeared", "grouped", "kwargs"}
FREE |= {"x_label", "y_label", "value_label", "head_label", "note", "diverging"}
FREE |= {"log_x", "log_y"}
FREE |= {"diagonal", "options", "size", "verdicts", "self", "others", "named", "what"}
NOT_FREE = {"load.load_model": {"name"}, "load.load_hf": {"name"}, "controls.by_steps": {"name"}}
NOT_FREE |= {"sliders.circuits_by_threshold": {"named"}, "sliders.with_slider": {"what"}}


@pytest.fixture(scope="module")
def kit(gpt2_stand_in, tmp_path_factory):
    """What right calls are made of, on a small random model with GPT-2's tokenizer."""
    model = load_model(str(gpt2_stand_in), device="cpu")
    prompts = ioi_prompts(model, 8)
    with torch.no_grad():
        on_abc = record(model, prompts.corrupted["abc"], ["z"])
        patterns = record(model, prompts.tokens, ["pattern"])
        other = record(tiny_model(), torch.ones(8, prompts.tokens.shape[1]).long(), ["z"])
    half, train, raw = tiny_model().half(), tiny_model().train(), build_toy(2)
    broken = tiny_model()
    broken.blocks[1].attn.W_O.data[0] = math.nan
    usual = means_by_place(on_abc.activations, prompts.positions)
    frames = [("a", {0: go.Scatter(y=[1, 2])}), ("b", {0: go.Scatter(y=[2, 1])})]
    film = with_slider(go.Figure(go.Scatter(y=[0, 0])), frames, "step", 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MECH_INTERP_RESULTS", str(tmp_path_factory.mktemp("results")))
        claim = Claim("It is.", "s", "Measured: m. Holds when it is.", holds=lambda figure: True)
        ledger = Ledger("project", {"a": claim}, "m", "w")
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50))
    nodes = {Node(Head(0, 1), "S2"), Node(Head(2, 3), "END")}
    trained = train_toy(1, n_steps=1)
    return SimpleNamespace(**locals())


def rows(kit):
    """A right call of each function, by name."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    model, prompts = kit.model, kit.prompts
    tokens, abc, answers = prompts.tokens, prompts.corrupted["abc"], prompts.answers
    n, length = tokens.shape
    metric, heads, nodes = LogitDiff(answers), [(0, 1), (2, 3)], kit.nodes
    short = torch.arange(3, 9).repeat(2, 1) + 1
    repeat = torch.cat([torch.full((2, 1), 50256), short, short], dim=1)
    circuit = {"name_mover": [(2, 3)], "induction": [(0, 1), (1, 2)]}
    edit = heads_from(model, heads, kit.on_abc)
    logits, two = rand(n, 2, 9), torch.tensor([[1, 2]] * n)
    patterns, at = rand(n, 3, 4, 4, 4), {"END": torch.arange(n) % 4, "S2": torch.arange(n) % 2}
    end, s2 = prompts.positions["END"], prompts.positions["S2"]
    steps, fall = torch.arange(0, 50, 10), 5.0 - torch.arange(5.0) ** 2 / 4
    on = dict(model=model, prompts=prompts)
    run = dict(model=model, tokens=tokens)
    ask = dict(**run, answers=answers)
    alone = dict(**on, means=kit.on_abc)
    series, cells, title = {"a": rand(4)}, rand(3, 4), dict(title="t")
    words = dict(title="t", x_label="x", y_label="y")
    grown = dict(factors={"a": 1 + rand(8)}, y=1 + rand(8))
    one = dict(model=model, tokens=tokens[:1])
    text = "When Mary and John went out, John gave it to"
    toy = dict(toy=Toy(1, False, 1, 8, 3, 5, 11, 2, n_steps=2))
    return {
        "LogitDiff": dict(answers=answers, hooks=[]),
        "TokenLoss": dict(targets=answers),
        "ablation.mean_run": run,
        "ablation.pattern_preserving": dict(model=model, heads=heads, patterns=kit.patterns),
        "ablation.losses": dict(**run, interventions={"a": edit}, columns=[0, 3]),
        "ablation.random_control": dict(
            model=model, heads=heads, n_draws=2, seed=0, exclude=[(1, 1)]
        ),
        "ablation.control_sizes": dict(model=model, ranked=heads, sizes=[1, 2]),
        "attribution.direct_logit_attribution": ask,
        "attribution.head_projections": dict(**ask, heads=heads),
        "attribution.of_heads": dict(values=rand(n, 3, 4), heads=heads),
        "attribution.attention_at": dict(
            patterns=patterns, heads=heads, dest=at["END"], source=at["S2"]
        ),
        "attribution.attention_table": dict(
            patterns=patterns, positions=at, heads=heads, dest="END", sources=["S2"], least=0.1
        ),
        "attribution.attribution_patching": dict(
            model=model, clean=tokens, corrupted=abc, metric=metric
        ),
        "checks.start_token": dict(model=model),
        "checks.check_model": dict(model=model),
        "checks.check_tokens": run,
        "checks.check_range": dict(name="values", values=two, size=5),
        "checks.indices": dict(name="values", values=[0, 2], size=5),
        "checks.check_count": dict(name="count", count=3, least=1),
        "checks.check_hooks": dict(model=model, hooks=[]),
        "checks.check_length": dict(model=model, n_tokens=5, name="n_tokens"),
        "checks.generator_of": dict(seed=1),
        "circuit.select_heads": dict(
            effects=rand(n, 3, 4), threshold=0.1, sign=1, groups=torch.arange(n) % 2 == 0
        ),
        "circuit.nodes": dict(circuit=circuit),
        "circuit.random_circuits": dict(model=model, circuit=circuit, n_draws=2),
        "circuit.check_prompts": on,
        "circuit.abc_means": dict(**on, site="z"),
        "circuit.check_means": alone,
        "circuit.node_mask": dict(**on, nodes=nodes),
        "circuit.means_run": dict(
            prompts=prompts, means=rand(int(prompts.template.max()) + 1, 3, length, 2), site="z"
        ),
        "circuit.knock_out": dict(**alone, removed=nodes),
        "circuit.outside": dict(**alone, kept=nodes),
        "circuit.logit_diffs": dict(**on, interventions=[edit], base=edit),
        "circuit.run_circuit": dict(**alone, kept=nodes),
        "circuit.faithfulness": dict(f_circuit=rand(n), f_model=rand(n)),
        "circuit.completeness": dict(**alone, circuit=circuit),
        "circuit.gap_by_prompt": dict(pairs={"none": (rand(n), rand(n)), "a": (rand(n), rand(n))}),
        "circuit.minimality": dict(**alone, circuit=circuit, choose=torch.arange(n) < 3),
        "edits.hooks": dict(edits=edit),
        "edits.record": dict(**run, sites=["z"], edits=edit, n_layers=2),
        "edits.only_at": dict(tokens=tokens, position=end),
        "edits.heads_from": dict(
            model=model, heads=heads, source=kit.on_abc, site="z", at=tokens == 11
        ),
        "edits.each_head_from": dict(model=model, heads=heads, source=kit.on_abc, site="z"),
        "edits.stream_from": dict(
            model=model, layer=1, source=0.0, site="resid_pre", at=tokens == 11
        ),
        "edits.nodes_from": dict(mask=rand(n, 3, length, 4) > 0.5, source=kit.on_abc),
        "edits.sweep": dict(**run, metric=metric, interventions=[edit], base=edit, read=None),
        "edits.check_sweep": dict(
            model=model, prompts={"tokens": tokens}, metric=metric, n_read=None
        ),
        "edits.hook_name": dict(layer=1, site="z"),
        "heads.n_site_heads": dict(model=model, site="z"),
        "heads.as_heads": dict(heads=heads),
        "heads.check_heads": dict(model=model, heads=heads, site="z"),
        "heads.all_heads": dict(model=model, site="z"),
        "heads.key_value_head": dict(model=model, head=(1, 2)),
        "heads.previous_token_score": dict(pattern=rand(2, 5, 5)),
        "heads.duplicate_token_score": dict(pattern=rand(2, 9, 9), seq_len=4),
        "heads.induction_score": dict(pattern=rand(2, 9, 9), seq_len=4),
        "heads.prefix_matching_score": dict(pattern=rand(2, 4, 13, 13), tokens=repeat.clone()),
        "heads.attention_patterns": run,
        "heads.score_heads": dict(
            model=model, tokens=repeat, score=FUNCTIONS["heads.induction_score"], seq_len=6
        ),
        "heads.top_heads": dict(scores=rand(3, 4), k=2, threshold=0.1),
        "ioi.single_token_names": dict(model=model),
        "ioi.ioi_prompts": dict(model=model, n_prompts=2, seed=0),
        "ioi.eight_prompts": dict(model=model),
        "ioi.adversarial_prompts": dict(model=model, n_prompts=2, seed=0),
        "metrics.estimate": dict(values=rand(4), strata=torch.tensor([0, 0, 1, 1]), clusters=None),
        "metrics.proportion": dict(successes=rand(4) > 0.5),
        "metrics.token_batches": run,
        "metrics.last_position_hooks": {},
        "metrics.hold_final_scale": run,
        "metrics.per_token_loss": dict(**run, hooks=[]),
        "metrics.half_losses": dict(loss=rand(2, 8), seq_len=4),
        "metrics.icl_score": dict(loss=rand(2, 20), early=5, late=15, window=2),
        "metrics.repeats_bigram": dict(tokens=repeat),
        "metrics.logit_diff": dict(logits=logits, answers=two),
        "metrics.accuracy": dict(logits=logits, answers=two),
        "metrics.answer_probability": dict(logits=logits, answers=two),
        "metrics.answer_rank": dict(logits=logits, answers=two),
        "metrics.normalised_effect": dict(
            patched=rand(n, 3), clean=1 + rand(n), corrupted=-rand(n)
        ),
        "patching.patch_heads": dict(
            model=model, clean=tokens, corrupted=abc, metric=metric, site="z", heads=heads
        ),
        "patching.patch_stream": dict(
            model=model,
            clean=tokens,
            corrupted=abc,
            metric=metric,
            site="resid_pre",
            positions=[1, 2],
            layers=[0, 1],
        ),
        "paths.path_patch": dict(
            model=model,
            original=tokens,
            new=abc,
            metric=metric,
            senders=[(0, 1), (1, 1)],
            receivers=[(2, 0), (2, 1)],
            site="q",
            positions=end,
        ),
        "power_law.fit_power_law": dict(**grown, seeds=torch.arange(8) % 2),
        "power_law.held_out_share": dict(**grown, groups=torch.arange(8) // 2),
        "prompts.ordinary_tokens": dict(model=model),
        "prompts.repeated_tokens": dict(model=model, n_prompts=2, seq_len=5, n_repeats=2, seed=0),
        "prompts.induction_prompts": dict(model=model, n_prompts=2, seq_len=8, seed=0),
        "prompts.long_texts": dict(model=model, n_texts=1, n_tokens=20, seed=0),
        "prompts.kind_prompts": dict(model=model, n_prompts=2, n_lines=8, seed=0),
        "selection.node_attribution": alone,
        "selection.named_nodes": dict(attribution=rand(n, 3, length, 4), prompts=prompts),
        "selection.each_added": dict(**alone, kept=nodes, candidates=[(Head(1, 1), "END")]),
        "selection.each_removed": dict(
            **alone, kept=nodes, candidates=[(Head(2, 3), "END")], removed={(Head(0, 1), "S2")}
        ),
        "selection.distance": dict(f_circuit=rand(3, n), f_model=rand(n)),
        "selection.forward_search": dict(
            **alone, candidates=[(Head(1, 1), "END")], n_steps=1, start=nodes
        ),
        "selection.backward_search": dict(**alone, candidates=sorted(nodes), n_left=1),
        "selection.worst_set": dict(**alone, kept=nodes, n_steps=1),
        "toy.build_toy": dict(n_layers=1, seed=0, n_heads=1, d_model=8, context=9),
        "toy.smear": dict(k=rand(2, 4, 3, 5), alpha=rand(3)),
        "toy.toy_batch": dict(
            generator=torch.Generator(), n_sequences=2, shortest=2, longest=3, context=9
        ),
        "toy.snapshot": dict(
            model=model, tokens=torch.arange(7, 12).repeat(2, 3)[:, :11], shortest=2
        ),
        "toy.train_toy": dict(n_layers=1, seed=0, n_steps=1),
        "training.sharpest_drop": dict(steps=steps, loss=fall, window=2),
        "toy.share_formed": dict(steps=steps, values=fall, centre=20.0, width=10.0),
        "toy.plateaus": dict(steps=steps, values=fall, centre=20.0, width=10.0),
        "toy.path_of": dict(losses=rand(4, 3)),
        "toy.tiny_model": dict(n_layers=1, seed=0),
        "weights.ov_weights": dict(model=model, heads=heads),
        "weights.qk_weights": dict(model=model, heads=heads),
        "weights.copying_of_output": dict(model=model, tokens=short),
        "weights.on_paper_scale": dict(share=rand(3)),
        "weights.copying_score": dict(model=model, tokens=short),
        "weights.eigenvalue_copying_score": dict(model=model),
        "weights.own_logit_largest": dict(model=model, heads=heads, n_tokens=3, seed=0),
        "weights.name_copying_score": dict(model=model, names=answers[:, 0], heads=heads, sign=1),
        "weights.name_copying_in_place": dict(**run, positions=s2, sign=1),
        "weights.composition_scores": dict(
            model=model, kind="K", writers=[(0, 1), (0, 2)], readers=[(2, 1), (2, 2)]
        ),
        "weights.composition_baseline": dict(model=model, n=3),
        "plotting.heatmap": dict(values=cells, x=list("abcd"), y=list("abc"), limit=1.0, **title),
        "plotting.head_heatmap": dict(values=cells, **title),
        "plotting.lines": dict(x=rand(4), series=series, **words),
        "plotting.panels": dict(
            x=rand(4),
            by_label={"a": series},
            x_label="x",
            marker=(0.5, "a"),
            window=(0.2, 0.4),
            **title,
        ),
        "plotting.bars": dict(
            names=list("abcd"),
            values=series["a"],
            errors=rand(4),
            y_label="y",
            baseline=(0.5, "a"),
            **title,
        ),
        "plotting.scatter": dict(x=rand(4), y=rand(4), names=list("abcd"), label_top=2, **words),
        "plotting.attention": dict(
            tokens=list("abc"), patterns=rand(2, 3, 3), names=["L0H0", "L0H1"]
        ),
        "diagram.circuit_diagram": dict(
            roles={"induction": [(1, 2)]},
            edges=[("induction", "logits", 0.5)],
            levels={"induction": 0},
            places={"induction": "S2"},
            **title,
        ),
        "rules.above": dict(figure=0.5, bound=0.2),
        "rules.at_least": dict(figure=0.5, bound=0.2),
        "rules.below": dict(figure=0.5, bound=0.7),
        "rules.every": {},
        "Ledger": dict(project="p", claims=kit.ledger.claims, model_label="m", weights="w"),
        "Ledger.record": dict(self=kit.ledger, claim_id="a", measured=0.5),
        "Ledger.record_heads": dict(self=kit.ledger, role="name_mover", heads=["L1H2"]),
        "Ledger.table": dict(self=kit.ledger, seeds=None, own_seed=0),
        "load.load_model": dict(name=str(kit.gpt2_stand_in), device="cpu"),
        "load.load_hf": dict(name=str(kit.gpt2_stand_in)),
        "load.model_label": dict(model=model),
        "load.weights_digest": dict(model=model),
        "training.check_toy": toy,
        "training.train": toy,
        "training.trained": toy,
        "controls.by_steps": dict(figure=kit.film, name="step"),
        "controls.your_text": dict(model=model, groups={"a": heads}, source=0.0, text=text),
        "controls.your_sentence": dict(model=model, found=circuit, means=kit.usual),
        "own_text.text_tokens": dict(model=model, text=text),
        "own_text.token_words": one,
        "own_text.run_text": dict(**one, heads=heads, off=[(1, 1)], source=kit.usual["END"]),
        "own_text.own_prompt": dict(model=model, sentence=text, io="Mary", s="John"),
        "own_text.means_by_place": dict(
            recorded=kit.on_abc.activations, positions=prompts.positions
        ),
        "own_text.run_at_end": dict(
            model=model,
            prompt=own_prompt(model, text, "Mary", "John"),
            heads=heads,
            out=nodes,
            means=kit.usual,
        ),
        "sliders.with_slider": dict(figure=kit.film, frames=kit.frames, what="step", start=0),
        "sliders.toy_training": dict(run=kit.trained, at=1.0),
        "sliders.circuits_by_threshold": dict(
            contributions={node: 0.5 for node in nodes},
            kept={1: {"all": Estimate(0.5, 0.1, 8)}},
            named=nodes,
        ),
    }


# What is wrong, by what is right

NOT_A_TENSOR = {"list": lambda x: x.tolist(), "none": None, "text": "x", "number": 1.5}


def tensors(x):
    wrong = {name: made(x) if callable(made) else made for name, made in NOT_A_TENSOR.items()}
    wrong |= {"an axis more": x[None], "an axis less": x[0], "empty": x[:0]}
    if x.is_floating_point():
        broken = x.clone()
        broken.view(-1)[0] = math.nan
        return wrong | {"whole": x.long(), "nan": broken, "inf": broken.nan_to_num(math.inf)}
    return wrong | {"float": x.float(), **({} if x.dtype == torch.bool else {"bool": x > 0})}


def places(x):
    """Token ids or positions."""
    return tensors(x) | {"negative": set_at(x, -1), "too large": set_at(x, 10**6)}


def set_at(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


def prompts_of_one_text(x):
    """Token ids of whole prompts: 50256 is padding, and the start token."""
    ends, begins = x.clone(), x.clone()
    ends[0, -2:] = 50256
    begins[-1, :3] = 50256
    padded = {"padding right": ends, "padding left": begins, "too long": x.repeat(1, 100)}
    return places(x) | padded | {"as text": ["When Mary and John"], "a row": x[0].tolist()}


def pairs(x):
    rest = list(x)
    return {
        "none": None,
        "text": "L1H2",
        "labels": ["L1H2"],
        "a single head": (1, 2),
        "floats": [(1.0, 2.0)],
        "a float later": [*rest, (1, 1.0)],
        "triples": [(1, 2, 3)],
        "twice": [*rest, rest[0]],
        "layer too high": [*rest, (99, 0)],
        "head too high": [*rest, (0, 99)],
        "negative": [*rest, (-1, 0)],
        "empty": [],
        "number": 3,
        "tensor": torch.tensor([[1.0, 2.0]]),
    }


COUNT = {"zero": 0, "negative": -1, "float": 1.5, "text": "3", "none": None, "nan": math.nan}
SEED = {"float": 1.5, "text": "a", "none": None, "negative": -1, "too large": 2**70}
NUMBER = {"text": "x", "none": None, "nan": math.nan, "list": [1.0]}
SITE = {"unknown": "zz", "none": None, "number": 3, "list": ["z"]}
SIGN = {"zero": 0, "float": 0.5, "text": "+", "none": None}
NODES = {"none": None, "list of heads": [(1, 2)], "text": "L1H2 END", "number": 1}
NODES |= {"no such place": {(Head(1, 2), "X")}, "no such head": {(Head(9, 0), "END")}}
METRIC = {
    "none": None,
    "text": "x",
    "mean over prompts": lambda logits: logits[:, -1, 0].mean(),
    "all logits": lambda logits: logits[:, -1],
    "an earlier position": lambda logits: logits[:, -2, 0],
    "mean over positions": lambda logits: logits.mean(1)[:, 0],
    "no such token": lambda logits: logits[:, -1, 10**6],
    "a number": lambda logits: 1.0,
    "no argument": lambda: 1.0,
    "answers of one prompt": LogitDiff(torch.tensor([[1, 2]])),
    "no such answer": LogitDiff(torch.tensor([[1, 10**6]] * 8)),
    "less their mean": lambda logits: logits[:, -1, 0] - logits[:, -1, 0].mean(),
    "less the next prompt's": lambda logits: logits[:, -1, 0] - logits[:, -1, 0].roll(1),
    "less the first prompt's": lambda logits: logits[:, -1, 0] - logits[0, -1, 0],
}
CIRCUIT = {
    "none": None,
    "list": [(1, 2)],
    "no such role": {"mover": [(1, 2)]},
    "a single head": {"name_mover": (1, 2)},
    "floats": {"name_mover": [(1.0, 2.0)]},
    "twice": {"name_mover": [(1, 2), (1, 2)]},
}


def wrong_prompts(x, kit):
    last = x.tokens.shape[1]
    at = x.positions | {"END": x.positions["END"] * 0 + last}
    return {
        "none": None,
        "tokens alone": x.tokens,
        "one row of answers": x._replace(answers=x.answers[:1]),
        "right is wrong": x._replace(answers=x.answers[:, [0, 0]]),
        "negative answers": x._replace(answers=-x.answers),
        "no tensor": x._replace(tokens=x.tokens.tolist()),
        "padding": x._replace(tokens=prompts_of_one_text(x.tokens)["padding left"]),
        "position too high": x._replace(positions=at),
        "fewer positions": x._replace(positions={k: v[:3] for k, v in x.positions.items()}),
    }


def wrong_runs(x, kit):
    cut = {name: z[:, :-1] for name, z in x.activations.items()}
    fewer = {name: z[:3] for name, z in x.activations.items()}
    nan = {name: z * math.nan for name, z in x.activations.items()}
    return {
        "none": None,
        "tensor": torch.ones(8, 3),
        "dict": {},
        "nothing in it": Run({}),
        "of shorter prompts": Run(cut),
        "of fewer prompts": Run(fewer),
        "nan": Run(nan),
        "of another model": kit.other,
        "lists": Run({name: z.tolist() for name, z in x.activations.items()}),
        "one number a head": Run({name: z[..., :1] for name, z in x.activations.items()}),
        "one head": Run({name: z[:, :, :1] for name, z in x.activations.items()}),
        "no activations": Run(None),
    }


def wrong_edits(x, kit):
    first, sources = x[0], wrong_runs(x[0].source, kit)
    return {
        "none": None,
        "number": 0.0,
        "text": "x",
        "hooks": [("blocks.0.attn.hook_z", len)],
        "no such place": [first._replace(name="blocks.9.attn.hook_z")],
        "where of floats": [first._replace(where=first.where.float())],
        "where of other prompts": [first._replace(where=torch.ones(3, 1, 4, 1).bool())],
        "source of fewer": [first._replace(source=sources["of fewer prompts"])],
        "nan in source": [first._replace(source=sources["nan"])],
        "of another model": [first._replace(source=kit.other)],
        **{f"source of {x!r}": [first._replace(source=x)] for x in (None, "x", math.nan, [1.0])},
        "source of a tensor": [first._replace(source=torch.ones(1))],
        "source of nothing": [first._replace(source=Run({}))],
        "name of a number": [first._replace(name=3)],
        "where of nothing": [first._replace(where=None)],
    }


HEADS = {"heads", "exclude", "ranked", "senders", "receivers", "writers", "readers"}
COUNTS = {"n_prompts", "n_draws", "n_steps", "n_tokens", "n_texts", "n_lines", "n_repeats"}
COUNTS |= {"n_sequences", "seq_len", "n", "n_layers", "window", "early", "late", "k", "count"}
COUNTS |= {"n_heads", "d_model", "context", "shortest", "longest"}
NAMED = {"seed": SEED, "sign": SIGN, "site": SITE, "metric": METRIC, "circuit": CIRCUIT}
NAMED |= dict.fromkeys(COUNTS, COUNT) | dict.fromkeys(("nodes", "kept", "removed"), NODES)
SOME = {"none": None, "float": [1.5], "text": "x", "negative": [-1], "too large": [10**6]}
SOME |= {"empty": [], "number": 1, "a float later": [1, 2.5]}
NAMED |= dict.fromkeys(("columns", "read", "layers", "sizes", "values"), SOME)
NAMED["kind"] = {"unknown": "X", "none": None, "number": 1}
NAMED["start"] = {name: value for name, value in NODES.items() if name != "number"}
NAMED["candidates"] = {
    "none": None,
    "empty": [],
    "text": "L1H2 END",
    "heads": [(1, 2)],
    "no such place": [(Head(1, 2), "X")],
    "no such head": [(Head(9, 0), "END")],
}
NAMED["sources"] = {"none": None, "number": 1, "empty": []}
NAMED["hooks"] = {
    "text": "x",
    "number": 1,
    "no function": [("blocks.0.attn.hook_z", 1)],
    "no such place": [("blocks.0.nowhere", len)],
}
NAMED["title"] = {"none": None, "number": 1}
PAIR = {
    "number": 1.5,
    "text": "ab",
    "one": (1.0,),
    "text first": ("a", "b"),
    "nan": (math.nan, "a"),
}
NAMED |= {"marker": PAIR, "baseline": PAIR, "window": PAIR | {"text second": (0.5, "a")}}
NAMED["label_top"] = {"none": None, "negative": -1, "float": 1.5, "text": "x"}
TEXTS = {"none": None, "number": 1, "list": ["a"], "empty": "", "punctuation": "?/"}
NAMED |= dict.fromkeys(("project", "model_label", "text", "sentence", "io", "s", "role"), TEXTS)
NAMED |= {"claim_id": TEXTS, "what": {"none": None, "number": 1}}
NAMED["weights"] = {"none": None, "number": 1}
NAMED["measured"] = {"text": "x", "list": [1.0], "yes": True, "pair": (0.5, 0.1)}
NAMED["measured"] |= {"error below 0": (0.5, -0.1, 3), "tensor": torch.ones(2)}
NAMED["claims"] = {"none": None, "list": ["a"], "of text": {"a": "b"}}
NAMED["name"] = TEXTS | {"no folder": Path("no/such"), "no model": "no such model"}
NAMED["toy"] = {
    "none": None,
    "text": "x",
    "batch of text": Toy(batch="x"),
    "float": Toy(n_heads=1.5),
}
NAMED["toy"] |= {"no heads": Toy(n_heads=0), "order": Toy(shortest=9, longest=5)}
NAMED["toy"] |= {
    "lr": Toy(lr=0.0),
    "nan": Toy(lr=math.nan),
    "longest": Toy(longest="x"),
    "seed": Toy(seed=-1),
}
NAMED["toy"] |= {"context": Toy(context=5), "rate": Toy(lr="x")}
ANY = {"none": None, "number": 1.5, "text": "x"}


def wrong_for(name, right, kit):
    """Wrong values for an argument, by what is wrong with them."""
    if isinstance(right, TransformerBridge):
        state = {"half precision": kit.half, "training": kit.train, "not folded": kit.raw}
        state |= {"nan weights": kit.broken}
        return {"none": None, "text": "gpt2-small", "plain model": kit.plain, **state}
    if isinstance(right, IOIPrompts):
        return wrong_prompts(right, kit)
    if isinstance(right, Run):
        return wrong_runs(right, kit)
    if name in ("base", "edits"):
        return wrong_edits(right, kit)
    if name == "interventions":
        made = (lambda x: {"a": x}) if isinstance(right, dict) else (lambda x: [x])
        each = wrong_edits(next(iter(right.values())) if isinstance(right, dict) else right[0], kit)
        nothing = {"none": None, "number": 1, "empty": type(right)()}
        return nothing | {f"one is {key}": made(x) for key, x in each.items()}
    if isinstance(right, Tensor):
        if right.dtype != torch.int64:
            return tensors(right)
        whole = name in ("tokens", "clean", "corrupted", "original", "new")
        return prompts_of_one_text(right) if whole else places(right)
    if name in HEADS:
        return pairs(right)
    if name in ("head", "reader"):
        return {key: value for key, value in pairs([right]).items() if key != "a single head"}
    if isinstance(right, float) and name not in NAMED:
        return NUMBER
    return NAMED.get(name, ANY)


# Where one of these is right after all
STATE = {"half precision", "training", "not folded", "nan weights"}
AXES = {"an axis more", "an axis less", "empty"}  # any axes; of nothing, nothing
FIT = {"of shorter prompts", "of fewer prompts", "nan", "lists", "one number a head", "one head"}
IDS = {"negative", "too large", "padding right", "padding left", "too long"}
ANSWERS = {"negative answers", "padding"}
DRAWN = {"whole", "nan", "inf", "list"}  # a figure has gaps


def each(argument, values, functions):
    return {(name, argument): values for name in functions.split()}


RIGHT = {
    # shapes and the tokenizer are read, no weights
    **each("model", STATE, "checks.start_token checks.check_hooks checks.check_length"),
    **each("model", STATE, "heads.n_site_heads heads.all_heads ioi.single_token_names"),
    **each("model", STATE, "prompts.ordinary_tokens prompts.repeated_tokens prompts.long_texts"),
    **each("model", STATE, "prompts.induction_prompts prompts.kind_prompts own_text.token_words"),
    **each("model", STATE, "weights.composition_baseline"),
    # a run as it is, with nothing read off or replaced that folding moves
    **each("model", {"not folded"}, "ioi.ioi_prompts ioi.eight_prompts ioi.adversarial_prompts"),
    **each("model", {"not folded"}, "checks.check_tokens heads.attention_patterns toy.snapshot"),
    **each("model", {"not folded"}, "heads.score_heads metrics.token_batches"),
    **each("model", {"not folded"}, "metrics.hold_final_scale metrics.per_token_loss"),
    # an edit is a value: what does not fit is refused by the run that it is put into
    **each("source", FIT, "edits.heads_from edits.each_head_from"),
    **each("means", {*FIT, "of another model"}, "circuit.knock_out circuit.outside"),
    **each("at", {"empty"}, "edits.heads_from edits.stream_from"),
    ("ablation.pattern_preserving", "patterns"): FIT,
    ("edits.nodes_from", "source"): {*FIT, "of another model"},
    ("edits.hooks", "edits"): {
        *("no such place", "where of floats", "where of other prompts", "where of nothing"),
        *("source of fewer", "nan in source", "of another model", "source of a tensor"),
        *("source of None", "source of 'x'", "source of nan", "source of [1.0]"),
        *("source of nothing", "name of a number"),
    },
    ("LogitDiff", "hooks"): {"no such place"},  # no model is known
    ("controls.by_steps", "name"): {"empty", "punctuation", "no model"},  # any text
    **each("text", {"punctuation"}, "controls.your_text own_text.text_tokens"),
    ("own_text.token_words", "tokens"): {"padding right", "padding left", "too long"},
    ("Ledger.table", "seeds"): {"text"},  # a file that is not there yet
    ("own_text.run_text", "source"): {"of fewer prompts"},  # it is of one
    ("Ledger.record_heads", "heads"): {"labels", "twice", "empty"},  # as text, and perhaps none
    **each("site", {"unknown"}, "circuit.means_run edits.hook_name"),
    ("ablation.control_sizes", "sizes"): {"too large"},  # there is no such control
    ("heads.as_heads", "heads"): {"twice", "layer too high", "head too high", "negative", "empty"},
    # each is measured alone, or marked once: a head that comes twice changes nothing
    **each("heads", {"twice"}, "ablation.pattern_preserving attribution.head_projections"),
    **each("heads", {"twice"}, "attribution.of_heads attribution.attention_at heads.check_heads"),
    **each("heads", {"twice"}, "attribution.attention_table edits.heads_from weights.ov_weights"),
    **each("heads", {"twice"}, "edits.each_head_from patching.patch_heads weights.qk_weights"),
    **each("heads", {"twice"}, "weights.own_logit_largest weights.name_copying_score"),
    **each("heads", {"twice"}, "own_text.run_text own_text.run_at_end"),
    ("paths.path_patch", "senders"): {"twice"},
    ("paths.path_patch", "receivers"): {"twice"},
    ("weights.composition_scores", "writers"): {"twice"},
    ("weights.composition_scores", "readers"): {"twice"},
    # no layer, no head or no node to leave out
    ("ablation.random_control", "exclude"): {"empty", "twice"},
    ("edits.record", "n_layers"): {"zero"},
    ("selection.each_removed", "kept"): {"none"},
    # tokens are compared with each other, or only counted
    **each("tokens", IDS, "edits.only_at heads.prefix_matching_score"),
    ("metrics.repeats_bigram", "tokens"): {*IDS, "empty"},
    **each("prompts", ANSWERS, "circuit.means_run selection.named_nodes"),
    ("LogitDiff", "answers"): {"too large"},  # no vocabulary is known
    ("TokenLoss", "targets"): {"too large"},
    ("power_law.fit_power_law", "seeds"): {"negative", "too large"},  # names of groups
    ("power_law.held_out_share", "groups"): {"negative", "too large"},
    ("prompts.long_texts", "seed"): {"negative", "too large"},  # any number
    # they still rise
    **each("steps", {"too large"}, "training.sharpest_drop toy.share_formed toy.plateaus"),
    ("attribution.of_heads", "values"): AXES,
    # a score of nan is nan, and is not ranked
    **each("pattern", {*AXES, "nan", "inf"}, "heads.previous_token_score heads.induction_score"),
    ("heads.duplicate_token_score", "pattern"): {*AXES, "nan", "inf"},
    ("heads.prefix_matching_score", "pattern"): {"nan", "inf"},
    **each("loss", {"empty"}, "metrics.half_losses metrics.icl_score"),
    ("selection.distance", "f_circuit"): AXES,
    ("toy.smear", "k"): {"empty"},
    ("weights.on_paper_scale", "share"): AXES,
    ("checks.check_range", "values"): AXES - {"empty"},
    ("checks.check_length", "n_tokens"): {"zero", "negative"},
    ("metrics.icl_score", "window"): {"zero"},
    **each("values", DRAWN, "plotting.heatmap plotting.head_heatmap plotting.bars"),
    **each("x", DRAWN, "plotting.lines plotting.panels plotting.scatter"),
    ("plotting.scatter", "y"): DRAWN,
    ("plotting.bars", "errors"): DRAWN,
    ("plotting.attention", "patterns"): DRAWN,
    # told by the ledger
    **each("figure", {"nan"}, "rules.above rules.at_least rules.below"),
    **each("bound", {"nan"}, "rules.above rules.at_least rules.below"),
}

# What an error may name in place of the argument: the part of it that is wrong
PART = {
    "prompts": ("answers", "tokens", "positions"),
    "means": ("source",),
    "source": ("edit",),
    "patterns": ("source",),
    "interventions": ("edit", "source"),
    "base": ("edit", "source"),
    "edits": ("edit", "source"),
    "metric": ("answers", "targets"),
    "kept": ("nodes",),
    "removed": ("nodes",),
    "candidates": ("nodes",),
    "start": ("nodes",),
    "dest": ("positions",),
    "names": ("values",),
    "sources": ("positions",),
    "errors": ("stderr",),
    "by_label": ("series",),
    "io": ("IO",),
    "s": ("S:",),
    "sentence": ("text",),
    "measured": ("an estimate", "standard error"),
    "contributions": ("kept",),
    "toy": Toy._fields,
}


def bad_inputs(name, kit):
    """Every wrong call of a function: (argument, what is wrong, the call)."""
    row = rows(kit)[name]
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    for argument, right in row.items():
        if argument in FREE and argument not in NOT_FREE.get(name, ()):
            continue
        right_too = RIGHT.get((name, argument), set())
        if argument in parameters and parameters[argument].default is None:
            right_too = right_too | {"none"}
        for what, value in wrong_for(argument, right, kit).items():
            if what not in right_too:
                yield argument, what, row | {argument: value}


def outcome(function, argument, call, forwards):
    """How a wrong call ends: "clear", or what is not good about it."""
    forwards.clear()
    try:
        function(**call)
    except (ValueError, TypeError) as error:
        text = str(error)
        if forwards:
            return f"late: {text[:150]}"
        # of two tensors that differ in length either may be named
        words = call if ", where " in text else (argument, *PART.get(argument, ()))
        named = any(word in text for word in words) and len(text) < 400
        return "clear" if named else f"unclear: {text[:150]}"
    except Exception as error:
        return f"unclear: {type(error).__name__}: {str(error)[:150]}"
    return "silent"


@pytest.fixture
def forwards(monkeypatch):
    """A list that grows with every forward pass."""
    spent, forward = [], TransformerBridge.forward

    def count(*args, **kwargs):
        spent.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(TransformerBridge, "forward", count)
    return spent


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_inputs_end_in_one_clear_sentence_before_any_forward_pass(name, kit, forwards):
    function, row = FUNCTIONS[name], rows(kit)[name]
    assert set(inspect.signature(function).parameters) <= {*row, *FREE}, "an argument is left out"
    function(**row)  # the row is right
    found = {
        f"{argument}, {what}": outcome(function, argument, call, forwards)
        for argument, what, call in bad_inputs(name, kit)
    }
    assert {case: how for case, how in found.items() if how != "clear"} == {}


def test_as_many_bad_inputs_are_tried_as_the_documentation_says(kit):
    assert sum(1 for name in FUNCTIONS for _ in bad_inputs(name, kit)) >= 3200
