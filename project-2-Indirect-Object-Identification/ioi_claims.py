"""The claims that the IOI notebook tests: what Wang et al. found, and when it holds for us.

`holds` is `rule` as a function of what the notebook records. The published figures are for
comparison only. Lists of heads may be empty. A bound is passed by more than two standard errors of
what is compared; within them a claim is undecided.
"""

from collections.abc import Iterable
from functools import partial

from utils.heads import Head
from utils.ledger.claims import Claim
from utils.ledger.rules import above, at_least, below, every

WANG = "Wang et al. 2022"
GPT2 = "gpt2-small"
TASK = ("ioi.logit_diff",)  # the model does the task
PATH = ("ioi.s_inhibition_queries",)  # and the path into the name movers was found
gpt2_claim = partial(Claim, published_model=GPT2)  # its published figure is of this model

# The 26 heads of GPT-2 small, by role: Wang et al. 2022, figure 2.
PUBLISHED_CIRCUIT = {
    role: [Head(*map(int, name.split("."))) for name in names.split()]
    for role, names in {
        "previous_token": "2.2 4.11",
        "duplicate_token": "0.1 0.10 3.0",
        "induction": "5.5 5.8 5.9 6.9",
        "s_inhibition": "7.3 7.9 8.6 8.10",
        "name_mover": "9.6 9.9 10.0",
        "negative_name_mover": "10.7 11.10",
        "backup_name_mover": "9.0 9.7 10.1 10.2 10.6 10.10 11.2 11.9",
    }.items()
}


def precision_recall(found: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """Share of the heads found that are published, and of the published that are found."""
    found = {tuple(head) for head in found}
    published = {tuple(head) for heads in PUBLISHED_CIRCUIT.values() for head in heads}
    both = len(found & published)
    return both / max(len(found), 1), both / len(published)


CLAIMS: dict[str, Claim] = {
    "ioi.logit_diff": gpt2_claim(
        "The model gives the indirect object a higher logit than the subject",
        f"{WANG}, section 2",
        published=3.56,
        quantity="mean logit difference",
        rule="Measured: mean logit difference. Holds when it is above 1.",
        holds=lambda clean: above(clean, 1),
    ),
    "ioi.accuracy": gpt2_claim(
        "It does so in nearly every prompt",
        f"{WANG}, section 2",
        published=0.993,
        quantity="share of prompts",
        rule="Measured: share of prompts in which the indirect object has the higher logit. Holds "
        "when it is 0.9 or more.",
        holds=lambda accuracy: at_least(accuracy, 0.9),
    ),
    "ioi.probability": gpt2_claim(
        "The indirect object is a likely next token",
        f"{WANG}, section 2",
        published=0.49,
        quantity="mean probability",
        rule="Measured: mean probability of the indirect object. Holds when it is above 0.1.",
        holds=lambda probability: above(probability, 0.1),
    ),
    "ioi.eight_prompts": gpt2_claim(
        "The same on the eight prompts of the TransformerLens demos",
        "TransformerLens, Exploratory Analysis Demo",
        published=3.552,
        quantity="mean logit difference",
        rule="Measured: mean logit difference, with the start token. Holds when it is above 1.",
        holds=lambda eight: above(eight, 1),
        needs=TASK,
    ),
    "ioi.dla_concentrated": gpt2_claim(
        "A few heads write most of the answer directly, and a few write against it",
        f"{WANG}, section 3.1",
        published="3 heads for, 2 against",
        quantity="share that five heads write",
        rule="Measured: of all that heads write for the answer, the share of five, the largest on "
        "other prompts. Holds when it is above half and some head writes against the answer by "
        "more than the threshold.",
        holds=lambda share, opponents: every(above(share, 0.5), bool(opponents)),
        needs=TASK,
    ),
    "ioi.same_heads": Claim(
        "Another draw of the prompts chooses the same heads",
        "ours; what a choice by a bound is worth",
        quantity="share of the heads that are chosen again",
        rule="Measured: of the heads that two of three draws of prompts choose together, the share "
        "that the third chooses by itself, over the three ways. Holds when it is above half.",
        n_of="heads",
        holds=lambda share: above(share, 0.5),
        needs=TASK,
    ),
    "ioi.attention_projection": gpt2_claim(
        "The more a name mover attends to a name, the more it writes that name",
        f"{WANG}, figure 3c",
        published="correlation above 0.81",
        quantity="mean correlation of attention and what is written",
        rule="Measured: mean over the name movers of the correlation, over prompts and names, "
        "between attention and projection. Holds when it is above 0.5 and some head writes for "
        "the answer by more than the threshold.",
        n_of="heads",
        holds=lambda correlation, writers: every(above(correlation, 0.5), bool(writers)),
        needs=TASK,
    ),
    "ioi.name_mover_attention": gpt2_claim(
        "Name movers attend from the end to the indirect object",
        f"{WANG}, section 3.1",
        published=0.59,
        quantity="mean attention to the indirect object, 0 to 1",
        rule="Measured: mean attention of the name movers from END to IO. Holds when it is above "
        "0.3, its difference from that to S1 and S2 together above zero, and some head writes for "
        "the answer by more than the threshold.",
        holds=lambda to_io, io_minus_s, writers: every(
            above(to_io, 0.3), above(io_minus_s, 0), bool(writers)
        ),
        needs=TASK,
    ),
    "ioi.copy_score": gpt2_claim(
        "Name movers copy names: what they read at a name raises that name",
        f"{WANG}, section 3.1",
        published="above 0.95; average head below 0.2",
        quantity="copy score of the name movers, 0 to 1",
        rule="Measured: copy score (top 5) of the name movers, on what they read in the prompt, "
        "each weighed by the size of its path effect. Holds when there are name movers, it is "
        "above 0.8, and above zero when twice the mean of all heads on the same prompts is taken "
        "off.",
        holds=lambda score, beyond_twice_all_heads, movers: every(
            bool(movers), above(score, 0.8), above(beyond_twice_all_heads, 0)
        ),
        needs=TASK,
    ),
    "ioi.negative_copy_score": gpt2_claim(
        "Negative name movers do the reverse: what they read at a name lowers that name",
        f"{WANG}, section 3.1",
        published="0.98; average head 0.12",
        quantity="copy score of the output turned round, 0 to 1",
        rule="Measured: copy score of the negative name movers with their output turned round, "
        "each weighed by the size of its path effect. Holds when there are such heads, it is above "
        "0.8, and above zero when twice the mean of all heads on the same prompts is taken off.",
        holds=lambda score, beyond_twice_all_heads, negative: every(
            bool(negative), above(score, 0.8), above(beyond_twice_all_heads, 0)
        ),
        needs=TASK,
    ),
    "ioi.s_inhibition_queries": gpt2_claim(
        "Some heads act through the name movers' queries, and attend from the end to S2",
        f"{WANG}, section 3.2",
        published="4 heads; attention to S2 0.51",
        quantity="share of the logit difference that is lost",
        rule="Measured: share of the logit difference lost along the path from the strongest head "
        "to the name movers' queries, on prompts that it was not chosen on. Holds when there are "
        "such heads and name movers, it is above 0.01, and the head attends to S2 more than to IO: "
        "the difference is above zero.",
        holds=lambda lost, s2_minus_io, senders, movers: every(
            bool(senders), bool(movers), above(lost, 0.01), above(s2_minus_io, 0)
        ),
        needs=TASK,
    ),
    "ioi.attention_shift": gpt2_claim(
        "Without the S-inhibition heads' signal the name movers look less at the indirect object "
        "and more at the subject",
        f"{WANG}, section 3.2 and figure 4",
        published="falls at IO, rises at S",
        quantity="fall of attention to IO minus that to S",
        rule="Measured: mean attention of the name movers from END to IO minus that to S1 and S2, "
        "less the same with the S-inhibition heads' output at END from ABC prompts. Holds when it "
        "is above 0.1, the fall at IO and the rise at S1 and S2 are above zero, and there are "
        "S-inhibition heads and name movers.",
        holds=lambda lost, io_falls, s_rises, senders, movers: every(
            bool(senders), bool(movers), above(lost, 0.1), above(io_falls, 0), above(s_rises, 0)
        ),
        needs=PATH,
    ),
    "ioi.s_inhibition_signal": gpt2_claim(
        "What S-inhibition heads carry is more the position of the subject than its name",
        f"{WANG}, appendix A",
        published="2.31 position, 0.99 token",
        quantity="coefficient of position minus that of token, logits",
        rule="Measured: coefficient of position minus coefficient of token in the fit. Holds when "
        "it is above zero.",
        holds=lambda advantage: above(advantage, 0),
        needs=PATH,
    ),
    "ioi.early_heads": gpt2_claim(
        "Duplicate-token and induction heads feed the S-inhibition heads' values at S2, and "
        "previous-token heads the induction heads' keys at S1+1",
        f"{WANG}, section 3.3",
        published="2 of each; 2 previous-token heads",
        quantity="share of the logit difference that is lost",
        rule="Measured: share of the logit difference lost through the S-inhibition heads' values, "
        "summed over the heads beyond the threshold, on prompts that they were not chosen on. "
        "Holds when it is above 0.01, an induction or duplicate-token head is among them, and a "
        "previous-token head passes for the induction heads' keys.",
        holds=lambda lost, at_s2, previous: every(bool(at_s2), bool(previous), above(lost, 0.01)),
        needs=PATH,
    ),
    "ioi.early_position": gpt2_claim(
        "What the induction and duplicate-token heads pass on is the position, too",
        f"{WANG}, section 3.3",
        published="at least 88 % by position, less than 8 % by token",
        quantity="cost of the turned position, as a share of that at the S-inhibition heads",
        rule="Measured: what turning the position round in the early heads' output at S2 costs, as "
        "a share of what it costs in the S-inhibition heads' output. Holds when there are early "
        "heads, it is above half, and the same for another name in the same place below a quarter.",
        holds=lambda position, token, noticing: every(
            bool(noticing), above(position, 0.5), below(token, 0.25)
        ),
        needs=PATH,
    ),
    "ioi.random_token_roles": gpt2_claim(
        "The early heads play the same roles on repeated random tokens",
        f"{WANG}, appendices H and I",
        published="among the top 1 to 5 heads",
        quantity="share of the early heads in the top tenth",
        rule="Measured: share of the early heads that are in the top tenth of all heads by the "
        "score of their role. Holds when it is above half.",
        n_of="heads",
        holds=lambda in_top: above(in_top, 0.5),
        needs=TASK,
    ),
    "ioi.backup": gpt2_claim(
        "Knock out the name movers, and other heads take over part of their work",
        f"{WANG}, section 3.4",
        published="only 5 % is lost",
        quantity="share of the logit difference that is lost",
        rule="Measured: share of the logit difference lost. Holds when there are name movers, what "
        "is saved (the share that they write directly, less what is lost) is above zero, and some "
        "other head writes more for the answer than before by more than the threshold, with the "
        "final norm's scale held.",
        holds=lambda lost, saved, movers, stepped_in: every(
            bool(movers), bool(stepped_in), above(saved, 0)
        ),
        needs=TASK,
    ),
    "ioi.backup_kinds": gpt2_claim(
        "Those that take over had no part before, and look where the paper's backup name movers do",
        f"{WANG}, section 3.4 and appendix F",
        published="8 heads of 4 kinds",
        quantity="share of the gain by such heads without a role before",
        rule="Measured: of what the heads that step in write more for the answer, the share that "
        "comes from heads without a role that are of one of the four kinds. Holds when it is above "
        "half and there are name movers and heads that step in.",
        holds=lambda share, movers, stepped_in: every(
            bool(movers), bool(stepped_in), above(share, 0.5)
        ),
        needs=TASK,
    ),
    "ioi.mlps": gpt2_claim(
        "Knocked out one at a time, only the first MLP is needed",
        f"{WANG}, appendix J",
        published="without the first the sign turns round",
        quantity="share of the logit difference that is lost",
        rule="Measured: share of the logit difference lost without the first MLP (mean ablation at "
        "all positions). Holds when it is above half, and below a quarter for every other.",
        holds=lambda first, largest_other: every(above(first, 0.5), below(largest_other, 0.25)),
        needs=TASK,
    ),
    "ioi.faithfulness": gpt2_claim(
        "The circuit alone does the task about as well as the model",
        f"{WANG}, section 4",
        published=0.87,
        quantity="logit difference of the circuit over the model's",
        rule="Measured: mean logit difference of the circuit over that of the model, on prompts "
        "that it was not chosen on. Holds when it is between 0.8 and 1.2 in each order of names.",
        holds=lambda ratio, ABBA, BABA: every(
            *(at_least(r, 0.8) for r in (ABBA, BABA)), *(at_least(1.2, r) for r in (ABBA, BABA))
        ),
        needs=PATH,
    ),
    "ioi.distance": Claim(
        "It does so prompt by prompt, and not by errors that cancel",
        "ours; a mean ratio hides what cancels",
        quantity="distance prompt by prompt, as a share of the logit difference",
        rule="Measured: mean over prompts of |F(C) - F(M)|, as a share of the mean F(M). Holds "
        "when it is below 0.3.",
        holds=lambda distance: below(distance, 0.3),
        needs=PATH,
    ),
    "ioi.attributed_circuit": Claim(
        "A circuit of as many nodes, chosen by node attribution, is as faithful",
        "ours; the method after Hanna et al. 2024",
        quantity="logit difference of the circuit over the model's",
        rule="Measured: mean logit difference of that circuit over that of the model, on prompts "
        "that it was not chosen on. Holds when it is between 0.8 and 1.2 in each order of names.",
        holds=lambda ratio, ABBA, BABA: every(
            *(at_least(r, 0.8) for r in (ABBA, BABA)), *(at_least(1.2, r) for r in (ABBA, BABA))
        ),
        needs=TASK,
    ),
    "ioi.greedy_circuit": Claim(
        "Some thirty nodes, chosen for how much of the behaviour they bring back, are nearly the "
        "model",
        "ours; the search after Wang et al. 2022, appendix M",
        quantity="logit difference of the circuit over the model's",
        rule="Measured: mean logit difference of that circuit over that of the model, on prompts "
        "that it was not chosen on. Holds when it is between 0.9 and 1.1 in each order of names "
        "and the distance, prompt by prompt, is below 0.3.",
        holds=lambda ratio, ABBA, BABA, distance: every(
            *(at_least(r, 0.9) for r in (ABBA, BABA)),
            *(at_least(1.1, r) for r in (ABBA, BABA)),
            below(distance, 0.3),
        ),
        needs=TASK,
    ),
    "ioi.no_repetition": Claim(
        "The preference comes from the name that is repeated: without one, no name is preferred to "
        "the giver",
        f"{WANG}, section 2: no answer is right on ABC prompts",
        quantity="preference for the other names, as a share of the logit difference",
        rule="Measured: on ABC prompts, mean logit of the two names mentioned first minus that of "
        "the giver, as a share of the logit difference. Holds when it is below a quarter.",
        holds=lambda share: below(share, 0.25),
        needs=TASK,
    ),
    "ioi.naive": gpt2_claim(
        "A naive circuit, one head of every role that supports the answer, is about as faithful",
        f"{WANG}, section 4.3",
        published="distance 0.1 (text) or 0.44 (stored data) of 3.56",
        quantity="logit difference of the circuit over the model's",
        rule="Measured: mean logit difference of the naive circuit over that of the model. Holds "
        "when its distance from the model is below a quarter of the model's.",
        holds=lambda ratio, distance, model: below(distance, 0.25 * model.mean),
        needs=PATH,
    ),
    "ioi.random_circuit": Claim(
        "A random circuit of the same size does not do the task",
        f"{WANG}, section 4",
        quantity="logit difference of the circuit over the model's",
        rule="Measured: mean logit difference over that of the model, mean over five draws and its "
        "error over them. Holds when it is below 0.3.",
        holds=lambda ratio: below(ratio, 0.3),
        needs=PATH,
    ),
    "ioi.completeness": gpt2_claim(
        "Knocked out role by role, circuit and model move alike",
        f"{WANG}, section 4.1",
        published="mean distance about 0.24 of the model's; naive 0.59 (stored data)",
        quantity="mean distance, as a share of the model's logit difference",
        rule="Measured: mean distance of circuit and model over the roles, as a share of the "
        "model's logit difference. Holds when it is below 0.3, and less that of the naive circuit "
        "below zero.",
        holds=lambda distance, beyond_naive: every(below(distance, 0.3), below(beyond_naive, 0)),
        needs=PATH,
    ),
    "ioi.worst_set": gpt2_claim(
        "Even the set of heads that tells them apart most moves circuit and model alike",
        f"{WANG}, section 4.1 (greedy search)",
        published="does not: the worst set found differs by 0.87 of the model's",
        quantity="distance, as a share of the model's logit difference",
        rule="Measured: mean distance of circuit and model without the worst set found, as a share "
        "of the model's logit difference, on prompts that the set was not chosen on. Holds when "
        "it is below half in each order of names.",
        holds=lambda distance, ABBA, BABA: every(below(ABBA, 0.5), below(BABA, 0.5)),
        needs=PATH,
    ),
    "ioi.minimality": gpt2_claim(
        "Every head of the circuit matters",
        f"{WANG}, section 4.2",
        published="at least 0.01",
        quantity="smallest change, as a share of the model's logit difference",
        rule="Measured: the smallest change that a head makes, as a share of the model's logit "
        "difference; which head and which comparison is chosen on other prompts. Holds when every "
        "head changes it by 0.01 or more.",
        holds=lambda smallest: at_least(smallest, 0.01),
        needs=PATH,
    ),
    "ioi.adversarial": gpt2_claim(
        "One more mention of the indirect object breaks the behaviour, one more of the subject "
        "does not",
        f"{WANG}, section 4.4",
        published="1.23 against 3.64",
        quantity="mean logit difference",
        rule="Measured: mean logit difference with an extra sentence about the indirect object. "
        "Holds when in each order of names it is below that with one about a third name, and below "
        "that with one about the subject: all four differences are above zero.",
        holds=lambda about_io, third_beyond_ABBA, third_beyond_BABA, s_beyond_ABBA, s_beyond_BABA: (
            every(
                *(above(less, 0) for less in (third_beyond_ABBA, third_beyond_BABA)),
                *(above(less, 0) for less in (s_beyond_ABBA, s_beyond_BABA)),
            )
        ),
        needs=TASK,
    ),
    "ioi.published_heads": gpt2_claim(
        "The heads found are those of the published circuit",
        f"{WANG}, figure 2",
        published="26 heads",
        quantity="share of the published heads that are found",
        rule="Measured: share of the published heads that are found. Holds when it is above half, "
        "and more than half of the heads found are published. For GPT-2 small only.",
        holds=lambda recall, precision: recall > 0.5 and precision > 0.5,
        only_for=GPT2,
    ),
}
