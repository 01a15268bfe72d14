"""The claims that the induction-heads notebook tests: who made them, and when they hold for us.

`holds` is `rule` as a function of what the notebook records. The published figures are for
comparison only. Lists of heads run from the strongest to the weakest, and may be empty. A bound is
passed by more than two standard errors of what is compared; within them a claim is undecided.
"""

from census_claims import CLAIMS as CENSUS
from utils.ledger.claims import Claim
from utils.ledger.rules import above, at_least, below, every

OLSSON = "Olsson et al. 2022"
ELHAGE = "Elhage et al. 2021"
GPT2 = "gpt2-small"
EXPLORE = "TransformerLens, Exploratory Analysis Demo"

CLAIMS: dict[str, Claim] = {
    "toy.phase_change": Claim(
        "Prefix matching and in-context learning of a two-layer attention-only model rise "
        "together, in a narrow window of training, from one plateau to another",
        f"{OLSSON}, arguments 1 and 3",
        published="over 75 % of the gain inside the window",
        published_model="models of 2 or more layers",
        quantity="share of the in-context-learning score that forms in the window",
        rule="Measured: share of the final in-context-learning score that forms in a quarter of "
        "the training, around the sharpest rise of the best prefix-matching score. Holds when it "
        "and the same share of that prefix-matching score are above 0.75, and the in-context-"
        "learning score has a plateau on both sides: half a window before and after, its rate is "
        "below a third of the rate inside. A window that opens so early that there is no rate "
        "before does not pass.",
        holds=lambda icl_share, prefix_share, rate_before, rate_after: (
            min(icl_share, prefix_share) > 0.75
            and all(rate < 1 / 3 for rate in (rate_before, rate_after))
        ),
    ),
    "toy.before_after": Claim(
        "What becomes easier across the window are the tokens that an induction head can know",
        f"{OLSSON}, argument 1",
        published="tokens that repeat",
        published_model="models of 2 or more layers",
        quantity="share of the change in the second copy but its first token",
        rule="Measured: of the change of all single tokens' losses across the window (sum of "
        "sizes), the share that is a fall in the second copy, its first token left out. Holds when "
        "it is above 0.75.",
        holds=lambda share: above(share, 0.75),
    ),
    "toy.path_turns": Claim(
        "The path of a two-layer model through the losses of single tokens turns at the phase "
        "change",
        f"{OLSSON}, argument 1",
        published="it turns",
        published_model="models of 2 or more layers",
        quantity="distance of the corner from the straight line, as a share of the line",
        rule="Measured: distance of the path's corner from the straight line between its ends, as "
        "a share of that line (two principal components; the corner is the snapshot farthest from "
        "the line). The bounds on variance and length were set after seed 0 was seen. Holds when "
        "it is above 0.25, the corner lies in the window of the phase change, the plane has more "
        "than 0.8 of the variance, and the line is more than twice as long as that of one layer.",
        holds=lambda bend, corner, opens, closes, explained, times_one_layer: (
            bend > 0.25 and opens <= corner <= closes and explained > 0.8 and times_one_layer > 2
        ),
    ),
    "toy.one_layer_control": Claim(
        "One attention-only layer learns neither: no induction head, hardly any gain on a repeat",
        f"{OLSSON}, argument 2",
        published="none forms",
        published_model="1 layer, attention only",
        quantity="best prefix-matching score of one layer, 0 to 1",
        rule="Measured: the best prefix-matching score of any head after training. Holds when it "
        "is below 0.2 and in-context learning below a third of what two layers reach.",
        holds=lambda best, share_of_two_layers: best < 0.2 and share_of_two_layers < 1 / 3,
    ),
    "toy.smeared_key": Claim(
        "Keys that mix in the previous token let one layer learn it, and let two layers learn it "
        "sooner",
        f"{OLSSON}, argument 2",
        published="forms; sooner",
        published_model="1 and 2 layers, smeared keys",
        quantity="best prefix-matching score of one layer with smeared keys, 0 to 1",
        rule="Measured: the best prefix-matching score of one layer with smeared keys. Holds when "
        "it is above 0.5 and two layers with smeared keys have their sharpest drop before two "
        "without.",
        holds=lambda best, drop_smeared, drop_plain: best > 0.5 and drop_smeared < drop_plain,
    ),
    "toy.previous_token_layer0": Claim(
        "The previous-token head sits in the first layer",
        f"{ELHAGE}, induction heads; {OLSSON}",
        published="layer 0",
        published_model="2 layers, attention only",
        quantity="best previous-token score, 0 to 1",
        rule="Measured: the best previous-token score, over the first copy. Holds when that head "
        "is in layer 0 and its score above 0.5.",
        holds=lambda best, heads: bool(heads) and heads[0].layer == 0 and best > 0.5,
    ),
    "toy.induction_layer1": Claim(
        "The induction head sits in the second layer",
        f"{ELHAGE}, induction heads; {OLSSON}",
        published="layer 1",
        published_model="2 layers, attention only",
        quantity="best prefix-matching score, 0 to 1",
        rule="Measured: the best prefix-matching score. Holds when that head is in layer 1, its "
        "score is above 0.5 and no head of layer 0 reaches half of it.",
        holds=lambda best, heads, best_of_layer0: (
            bool(heads) and heads[0].layer == 1 and best > 0.5 and best_of_layer0 < best / 2
        ),
    ),
    "toy.k_composition": Claim(
        "The induction pattern is built through the keys: taking the previous-token head out of "
        "the induction head's keys alone destroys it",
        f"{ELHAGE}, K-composition",
        quantity="share of the prefix-matching score that is left",
        rule="Measured: prefix-matching score of the induction heads that is left, as a share, "
        "after the previous-token heads are taken out of their keys. Holds when it is below 0.5, "
        "and above 0.9 for queries; and so much of the gain on the second copy is left for values, "
        "on which a pattern cannot depend.",
        holds=lambda keys, queries, values: keys < 0.5 and queries > 0.9 and values > 0.9,
    ),
    "toy.copying": Claim(
        "The induction head's OV circuit copies: the token attended to raises its own logit",
        f"{ELHAGE}, copying heads",
        published="positive eigenvalues",
        published_model="2 layers, attention only",
        quantity="mean eigenvalue copying score, -1 to 1",
        rule="Measured: mean eigenvalue copying score of the induction heads, -1 to 1. Holds when "
        "it is above 0.5 and each head's is above zero.",
        holds=lambda mean, lowest: mean > 0.5 and lowest > 0,
    ),
    "lm.repeat_loss": Claim(
        "The loss on the second copy of a random sequence collapses",
        "TransformerLens, Main Demo",
        published="12.05 to 0.18 nats",
        published_model=GPT2,
        quantity="loss on the second copy, nats per token",
        rule="Measured: loss on the second copy, in nats per token. Holds when it is below half "
        "the loss on the first copy.",
        holds=lambda second_copy, first_copy: below(second_copy, first_copy.mean / 2),
    ),
    "lm.induction_heads": Claim(
        "A few heads spend at least 0.4 of their attention on the token after an earlier copy",
        EXPLORE,
        published="5 heads at 0.85 to 0.93",
        published_model=GPT2,
        quantity="best induction-stripe score, 0 to 1",
        rule="Measured: induction-stripe score of the best head, on prompts that it was not chosen "
        "on. Holds when it is 0.4 or more, and some heads, but fewer than a tenth of all, score as "
        "much.",
        holds=lambda best, heads, n_heads: every(
            at_least(best, 0.4), 0 < len(heads) < n_heads / 10
        ),
    ),
    "lm.prefix_matching": Claim(
        "The same heads stand out by prefix matching over four copies of a random sequence",
        f"{OLSSON}, appendix",
        published="0.75 to 0.94",
        published_model="40 layers, three example heads",
        quantity="best prefix-matching score, 0 to 1",
        rule="Measured: prefix-matching score of the head with the highest stripe score. Holds "
        "when it is above 0.4 and three or more of the top five heads by prefix matching are among "
        "the top five by the stripe.",
        holds=lambda best, in_both_top_fives: every(above(best, 0.4), len(in_both_top_fives) >= 3),
    ),
    "lm.copying": Claim(
        "Induction heads copy: their output raises the logits of the tokens they attend to",
        f"{OLSSON}, appendix (head activation evaluators)",
        published="0.20 to 0.89",
        published_model="40 layers, three example heads",
        quantity="mean copying score of the induction heads, -1 to 1",
        rule="Measured: mean copying score of the induction heads' whole output, -1 to 1 on the "
        "paper's scale. Holds when there are induction heads and their mean is above zero, "
        "also when that of all heads on the same prompts is taken off.",
        holds=lambda copying, beyond_all_heads, induction: every(
            bool(induction), above(copying, 0), above(beyond_all_heads, 0)
        ),
    ),
    "lm.copying_in_total": Claim(
        "On a repeat the induction heads raise the right token's logit, most of it through later "
        "layers",
        f"{OLSSON}, appendix (the direct part alone)",
        quantity="fall of the right token's logit",
        rule="Measured: by how much mean ablation of the largest set lowers the right token's "
        "logit (above the mean logit) on the second copy. Holds when it is above zero, above that "
        "of as many random heads of the same layers, and above two times what the set writes to "
        "that logit directly.",
        holds=lambda total, beyond_control, beyond_twice_direct: every(
            above(total, 0), above(beyond_control, 0), above(beyond_twice_direct, 0)
        ),
    ),
    "lm.previous_token_heads": Claim(
        "Some head spends at least 0.4 of its attention on the previous token",
        EXPLORE,
        published=0.992,
        published_model=GPT2,
        quantity="best previous-token score, 0 to 1",
        rule="Measured: previous-token score of the best head, on prompts that it was not chosen "
        "on. Holds when it is 0.4 or more and a head that scores as much lies in a layer below the "
        "last induction head.",
        holds=lambda best, previous, induction: every(
            at_least(best, 0.4), any(p.layer < i.layer for p in previous for i in induction)
        ),
    ),
    "lm.duplicate_token_heads": Claim(
        "Some head spends at least 0.4 of its attention on earlier copies of the present token",
        EXPLORE,
        published=0.703,
        published_model=GPT2,
        quantity="best duplicate-token score, 0 to 1",
        rule="Measured: duplicate-token score of the best head, on prompts that it was not chosen "
        "on. Holds when it is 0.4 or more.",
        holds=lambda best: at_least(best, 0.4),
    ),
    "lm.icl_score": Claim(
        "Later tokens of ordinary text are easier to predict than early ones",
        f"{OLSSON}, argument 1",
        published=-0.4,
        published_model="2 to 40 layers",
        quantity="loss late in the text minus loss early, nats per token",
        rule="Measured: loss late in the text minus loss early, in nats. Holds when it is below "
        "zero.",
        holds=lambda icl: below(icl, 0),
    ),
    "lm.ablation": Claim(
        "Ablating the induction heads removes most of the gain on a repeat; ablating as many "
        "random heads of the same layers does not",
        f"{OLSSON}, argument 3",
        quantity="share of the gain that is lost",
        rule="Measured: share of the gain on the second copy that mean ablation of the largest "
        "set removes. Holds when it is above a half, and below a quarter for the random control "
        "(mean of two draws).",
        holds=lambda lost, control: every(above(lost, 0.5), below(control, 0.25)),
        needs=("lm.repeat_loss",),
    ),
    "lm.icl_ablation": Claim(
        "Induction heads account for most of in-context learning on ordinary text",
        f"{OLSSON}, argument 3",
        published="almost all of it",
        published_model="small attention-only models",
        quantity="change of the in-context-learning score, nats per token",
        rule="Measured: change of the in-context-learning score under mean ablation of the largest "
        "set, in nats. Holds when more than half of the score is gone, text by text, and the "
        "difference from the random control's change is above zero.",
        holds=lambda change, beyond_half_the_score, beyond_control: every(
            above(beyond_half_the_score, 0), above(beyond_control, 0)
        ),
        needs=("lm.icl_score",),
    ),
    "lm.icl_bigrams": Claim(
        "On ordinary text the induction heads serve the tokens that repeat an earlier bigram, and "
        "hardly the others",
        f"{OLSSON}, argument 3; repeated bigrams as in Arora et al. 2023",
        quantity="rise of the loss on repeated bigrams, nats per token",
        rule="Measured: rise of the loss on tokens that repeat an earlier bigram under mean "
        "ablation of the largest set, in nats. Holds when it is above zero, above ten times the "
        "rise on the other tokens, and above the random control's rise on the same tokens.",
        holds=lambda rise, beyond_ten_times_others, beyond_control: every(
            above(rise, 0), above(beyond_ten_times_others, 0), above(beyond_control, 0)
        ),
    ),
    "lm.pattern_matching": Claim(
        "Some induction head matches by meaning too: at the end of a line it attends to the labels "
        "of earlier lines of the same kind, though no word comes back",
        f"{OLSSON}, argument 4",
        published="about 0.65",
        published_model="40 layers, one example head",
        quantity="share of the attention to labels that is on the same kind",
        rule="Measured: of the attention that the best induction head (chosen on other prompts) "
        "gives to the labels, the share on those of lines of the same kind; chance is a quarter. "
        "Holds when there are induction heads, it is above 0.5, and labels get more than a tenth "
        "of the head's attention.",
        holds=lambda share, attention_to_labels, induction: every(
            bool(induction), above(share, 0.5), above(attention_to_labels, 0.1)
        ),
    ),
    "lm.zero_vs_mean": Claim(
        "Zero ablation takes away more than mean ablation does",
        "Wang et al. 2022, section 2.1",
        quantity="share lost by zero ablation minus share lost by mean ablation",
        rule="Measured: share of the gain removed by zero ablation minus the share removed by mean "
        "ablation, over all sizes of set. Holds when it is above zero.",
        holds=lambda gap: above(gap, 0),
        needs=("lm.repeat_loss",),
    ),
    "lm.patching_kqv": Claim(
        "Changing the query, what precedes the answer, or the answer itself acts through the "
        "induction heads' queries, keys and values respectively",
        f"{ELHAGE}, induction heads",
        quantity="effect of the expected input minus that of the better other one",
        rule="Measured: effect of the input that should carry a change minus that of the better "
        "other input, for the weakest of the three changes. Holds when it is above 0.1, and the "
        "model's own preference for the answer above zero.",
        holds=lambda weakest, clean: every(above(weakest, 0.1), above(clean, 0)),
    ),
    "lm.k_composition": Claim(
        "The weights of a previous-token head compose with induction heads' keys more than those "
        "of other heads do",
        f"{ELHAGE}, composition; ARENA",
        published="0.112 against 0.036",
        published_model="ARENA's 2-layer attention-only model",
        quantity="K-composition score",
        rule="Measured: K-composition of the head with the highest previous-token score, mean over "
        "the induction heads. Holds when there are heads of both kinds, and it is above zero when "
        "that of the highest head without the role, below the same induction heads, is taken off.",
        holds=lambda best, beyond_best_other, previous, induction: every(
            bool(previous and induction), above(beyond_best_other, 0)
        ),
    ),
}
CLAIMS |= CENSUS
