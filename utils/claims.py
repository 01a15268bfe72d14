"""The claims the notebooks test: what is claimed, by whom, with which figure, and our rule.

Plain data. `published` is the source's own figure (a number, or a few words where there is no
single one), `published_model` what it was measured on, and `rule` says what we measure and when we
say that the claim holds. The published figures are for comparison only; no verdict reads them.
"""

from __future__ import annotations

from typing import NamedTuple

OLSSON = "Olsson et al. 2022"
ELHAGE = "Elhage et al. 2021"
WANG = "Wang et al. 2022"
GPT2 = "gpt2-small"
DEMO = "TransformerLens, Main Demo"
EXPLORE = "TransformerLens, Exploratory Analysis Demo"


class Claim(NamedTuple):
    """One published claim and the rule by which a run of ours supports it or not."""

    statement: str
    source: str
    published: float | str | None
    published_model: str | None
    rule: str
    only_for: str | None = None  # the one model that the claim is about


CLAIMS: dict[str, Claim] = {
    "toy.phase_change": Claim(
        "Prefix matching and in-context learning of a two-layer attention-only model rise "
        "together, in a narrow window of training",
        f"{OLSSON}, arguments 1 and 3",
        "over 75 % of the gain inside the window",
        "models of 2 or more layers",
        "Measured: share of the final in-context-learning score that forms in a quarter of the "
        "training, around the sharpest drop. Holds when it and the same share of the best "
        "prefix-matching score are above 0.75.",
    ),
    "toy.one_layer_control": Claim(
        "One attention-only layer learns neither: no induction head, hardly any gain on a repeat",
        f"{OLSSON}, argument 2",
        "none forms",
        "1 layer, attention only",
        "Measured: the best prefix-matching score of any head after training. Holds when it is "
        "below 0.2 and in-context learning below a third of what two layers reach.",
    ),
    "toy.smeared_key": Claim(
        "Keys that mix in the previous token let one layer learn it, and let two layers learn it "
        "sooner",
        f"{OLSSON}, argument 2",
        "forms; sooner",
        "1 and 2 layers, smeared keys",
        "Measured: the best prefix-matching score of one layer with smeared keys. Holds when it is "
        "above 0.5 and two layers with smeared keys have their sharpest drop before two without.",
    ),
    "toy.previous_token_layer0": Claim(
        "The previous-token head sits in the first layer",
        f"{ELHAGE}, induction heads; {OLSSON}",
        "layer 0",
        "2 layers, attention only",
        "Measured: the best previous-token score, over the first copy. Holds when that head is in "
        "layer 0 and its score above 0.5.",
    ),
    "toy.induction_layer1": Claim(
        "The induction head sits in the second layer",
        f"{ELHAGE}, induction heads; {OLSSON}",
        "layer 1",
        "2 layers, attention only",
        "Measured: the best prefix-matching score. Holds when that head is in layer 1, its score "
        "is above 0.5 and no head of layer 0 reaches half of it.",
    ),
    "toy.k_composition": Claim(
        "The induction pattern is built through the keys: taking the previous-token head out of "
        "the induction head's keys alone destroys it",
        f"{ELHAGE}, K-composition",
        None,
        None,
        "Measured: prefix-matching score of the induction heads that is left, as a share, after "
        "the previous-token heads are taken out of their keys. Holds when it is below 0.5, and "
        "above 0.9 for queries and for values.",
    ),
    "toy.copying": Claim(
        "The induction head's OV circuit copies: the token attended to raises its own logit",
        f"{ELHAGE}, copying heads",
        "positive eigenvalues",
        "2 layers, attention only",
        "Measured: mean eigenvalue copying score of the induction heads, -1 to 1. Holds when it is "
        "above 0.5 and each head's is positive.",
    ),
    "lm.repeat_loss": Claim(
        "The loss on the second copy of a random sequence collapses",
        DEMO,
        "12.05 to 0.18 nats",
        "gpt2-small",
        "Measured: loss on the second copy, in nats per token. Holds when it is below half the "
        "loss on the first copy.",
    ),
    "lm.induction_heads": Claim(
        "A few heads attend almost wholly to the token after an earlier copy",
        EXPLORE,
        "5 heads at 0.85 to 0.93",
        "gpt2-small",
        "Measured: the best induction-stripe score. Holds when some heads, but fewer than a "
        "tenth of all, score 0.4 or more.",
    ),
    "lm.prefix_matching": Claim(
        "The same heads stand out by prefix matching over four copies of a random sequence",
        f"{OLSSON}, appendix",
        "0.75 to 0.94",
        "40 layers, three example heads",
        "Measured: the best prefix-matching score. Holds when it is above 0.4 and three or more "
        "of its top five heads are among the top five by the stripe.",
    ),
    "lm.copying": Claim(
        "Induction heads copy: their output raises the logits of the tokens they attend to",
        f"{OLSSON}, appendix",
        "0.20 to 0.89",
        "40 layers, three example heads",
        "Measured: mean copying score of the induction heads, -1 to 1. Holds when there are "
        "induction heads and their mean is above zero and above that of all heads.",
    ),
    "lm.previous_token_heads": Claim(
        "Some head attends almost wholly to the previous token",
        EXPLORE,
        0.992,
        "gpt2-small",
        "Measured: the best previous-token score. Holds when a head that scores 0.4 or more "
        "lies in a layer below the last induction head.",
    ),
    "lm.duplicate_token_heads": Claim(
        "Some heads attend to earlier copies of the present token",
        EXPLORE,
        0.703,
        "gpt2-small",
        "Measured: the best duplicate-token score. Holds when some head scores 0.4 or more.",
    ),
    "lm.icl_score": Claim(
        "Later tokens of ordinary text are easier to predict than early ones",
        f"{OLSSON}, argument 1",
        -0.4,
        "2 to 40 layers",
        "Measured: loss late in the text minus loss early, in nats. Holds when it is below zero "
        "by more than two standard errors.",
    ),
    "lm.ablation": Claim(
        "Ablating the induction heads removes most of the gain on a repeat; ablating as many "
        "random heads of the same layers does not",
        f"{OLSSON}, argument 3",
        None,
        None,
        "Measured: share of the gain on the second copy that mean ablation of the largest set "
        "removes. Holds when it is above a half, and below a quarter for the random control.",
    ),
    "lm.icl_ablation": Claim(
        "Induction heads account for most of in-context learning on ordinary text",
        f"{OLSSON}, argument 3",
        "almost all of it",
        "small attention-only models",
        "Measured: change of the in-context-learning score under zero ablation of the largest "
        "set, in nats. Holds when it is above half of the score itself, and above the random "
        "control's change by more than two standard errors.",
    ),
    "lm.zero_vs_mean": Claim(
        "Zero ablation overstates what a head does, compared with mean ablation",
        "Wang et al. 2022, section 2.1",
        None,
        None,
        "Measured: share of the gain removed by zero ablation minus the share removed by mean "
        "ablation, over all sizes of set. Holds when it is above zero by more than two standard "
        "errors.",
    ),
    "lm.patching_kqv": Claim(
        "Changing the query, what precedes the answer, or the answer itself acts through the "
        "induction heads' queries, keys and values respectively",
        f"{ELHAGE}, induction heads",
        None,
        None,
        "Measured: effect of the input that should carry a change minus that of the better "
        "other input, for the weakest of the three changes. Holds when it is above 0.1, and "
        "above zero by more than two standard errors.",
    ),
    "lm.k_composition": Claim(
        "The weights of a previous-token head compose with induction heads' keys more than those "
        "of other heads do",
        f"{ELHAGE}, composition; ARENA",
        "0.112 against 0.036",
        "ARENA's 2-layer attention-only model",
        "Measured: K-composition of the highest previous-token head, mean over the induction "
        "heads. Holds when it is above that of every other head below the induction heads.",
    ),
    "ioi.logit_diff": Claim(
        "The model gives the indirect object a higher logit than the subject",
        f"{WANG}, section 2",
        3.56,
        GPT2,
        "Measured: mean logit difference. Holds when it is above 1 and above zero by more than "
        "three standard errors.",
    ),
    "ioi.accuracy": Claim(
        "It does so in nearly every prompt",
        f"{WANG}, section 2",
        0.993,
        GPT2,
        "Measured: share of prompts in which the indirect object has the higher logit. Holds when "
        "it is 0.9 or more.",
    ),
    "ioi.probability": Claim(
        "The indirect object is a likely next token",
        f"{WANG}, section 2",
        0.49,
        GPT2,
        "Measured: mean probability of the indirect object. Holds when it is above 0.1.",
    ),
    "ioi.eight_prompts": Claim(
        "The same on the eight prompts of the TransformerLens demos",
        EXPLORE,
        3.552,
        GPT2,
        "Measured: mean logit difference, with the start token. Holds when it is above 1 and above "
        "zero by more than three standard errors.",
    ),
    "ioi.dla_concentrated": Claim(
        "A few heads write most of the answer directly, and a few write against it",
        f"{WANG}, section 3.1",
        "3 heads for, 2 against",
        GPT2,
        "Measured: of all that heads write for the answer, the share of the five largest. Holds "
        "when it is above half, some head writes against the answer by more than the threshold, "
        "and the model does the task.",
    ),
    "ioi.attention_projection": Claim(
        "The more a name mover attends to a name, the more it writes that name",
        f"{WANG}, figure 3c",
        "correlation above 0.81",
        GPT2,
        "Measured: mean over the name movers of the correlation, over prompts and names, between "
        "attention and projection. Holds when it is above 0.5.",
    ),
    "ioi.name_mover_attention": Claim(
        "Name movers attend from the end to the indirect object",
        f"{WANG}, section 3.1",
        0.59,
        GPT2,
        "Measured: mean attention of the name movers from END to IO. Holds when it is above 0.3 "
        "and above that to S1 and S2 together by more than two standard errors.",
    ),
    "ioi.copy_score": Claim(
        "Name movers copy names: what they read at a name raises that name",
        f"{WANG}, section 3.1",
        "above 0.95; average head below 0.2",
        GPT2,
        "Measured: mean copy score (top 5) of the name movers, on what they read in the prompt. "
        "Holds when it is above 0.8 and at least twice the mean of all heads.",
    ),
    "ioi.negative_copy_score": Claim(
        "Negative name movers do the reverse: what they read at a name lowers that name",
        f"{WANG}, section 3.1",
        "0.98; average head 0.12",
        GPT2,
        "Measured: mean copy score of the negative name movers with their output turned round. "
        "Holds when it is above 0.8 and at least twice the mean of all heads.",
    ),
    "ioi.s_inhibition_queries": Claim(
        "Some heads act through the name movers' queries, and attend from the end to S2",
        f"{WANG}, section 3.2",
        "4 heads; attention to S2 0.51",
        GPT2,
        "Measured: share of the logit difference lost along the path from the strongest head to "
        "the name movers' queries. Holds when it passes the threshold, and the head attends to S2 "
        "more than to IO.",
    ),
    "ioi.s_inhibition_signal": Claim(
        "What S-inhibition heads carry is more the position of the subject than its name",
        f"{WANG}, appendix A",
        "2.31 position, 0.99 token",
        GPT2,
        "Measured: coefficient of position minus coefficient of token in the fit. Holds when it is "
        "above zero by more than two standard errors.",
    ),
    "ioi.early_heads": Claim(
        "Duplicate-token and induction heads feed the S-inhibition heads' values at S2, and "
        "previous-token heads the induction heads' keys at S1+1",
        f"{WANG}, section 3.3",
        "2 of each; 2 previous-token heads",
        GPT2,
        "Measured: share of the logit difference lost through the S-inhibition heads' values, "
        "summed over the heads beyond the threshold. Holds when an induction or duplicate-token "
        "head is among them, and a previous-token head passes for the induction heads' keys.",
    ),
    "ioi.random_token_roles": Claim(
        "The early heads play the same roles on repeated random tokens",
        f"{WANG}, appendices H and I",
        "among the top 1 to 5 heads",
        GPT2,
        "Measured: share of the early heads that are in the top tenth of all heads by the score of "
        "their role. Holds when it is above half.",
    ),
    "ioi.backup": Claim(
        "Knock out the name movers, and other heads take over part of their work",
        f"{WANG}, section 3.4",
        "only 5 % is lost",
        GPT2,
        "Measured: share of the logit difference lost. Holds when it is below the share that the "
        "name movers write directly by more than two standard errors, and some other head writes "
        "more for the answer than before by more than the threshold.",
    ),
    "ioi.faithfulness": Claim(
        "The circuit alone does the task about as well as the model",
        f"{WANG}, section 4",
        0.87,
        GPT2,
        "Measured: mean logit difference of the circuit over that of the model. Holds when it is "
        "between 0.8 and 1.2.",
    ),
    "ioi.naive": Claim(
        "A naive circuit, a few heads of the main roles, is about as faithful",
        f"{WANG}, section 4.3",
        "distance 0.1 (text) or 0.44 (stored data) of 3.56",
        GPT2,
        "Measured: mean logit difference of the naive circuit over that of the model. Holds when "
        "its distance from the model is below a quarter of the model's.",
    ),
    "ioi.random_circuit": Claim(
        "A random circuit of the same size does not do the task",
        f"{WANG}, section 4",
        None,
        None,
        "Measured: mean logit difference over that of the model, mean of five draws. Holds when it "
        "is below 0.3.",
    ),
    "ioi.completeness": Claim(
        "Knocked out role by role, circuit and model move alike",
        f"{WANG}, section 4.1",
        "mean distance about 0.24 of the model's; naive 0.59 (stored data)",
        GPT2,
        "Measured: mean distance of circuit and model over the roles, as a share of the model's "
        "logit difference. Holds when it is below 0.3 and below that of the naive circuit.",
    ),
    "ioi.minimality": Claim(
        "Every head of the circuit matters",
        f"{WANG}, section 4.2",
        "at least 0.01",
        GPT2,
        "Measured: the smallest change that a head makes, as a share of the model's logit "
        "difference. Holds when every head changes it by 0.01 or more.",
    ),
    "ioi.adversarial": Claim(
        "One more mention of the indirect object breaks the behaviour, one more of the subject "
        "does not",
        f"{WANG}, section 4.4",
        "1.23 against 3.64",
        GPT2,
        "Measured: mean logit difference with an extra sentence about the indirect object. Holds "
        "when it is below that without a sentence, and below that with one about the subject, by "
        "more than two standard errors each.",
    ),
    "ioi.published_heads": Claim(
        "The heads found are those of the published circuit",
        f"{WANG}, figure 2",
        "26 heads",
        GPT2,
        "Measured: share of the published heads that are found. Holds when it is above half, and "
        "more than half of the heads found are published. For GPT-2 small only.",
        only_for=GPT2,
    ),
}
