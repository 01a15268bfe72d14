"""Exercises 7 to 11: answers as a learner would write them, right and wrong, and what is said."""

import pytest
import torch

import induction_exercises as checks


def told(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


# Right answers, each by another way than the reference


def icl_by_lists(loss, early, late):
    return torch.tensor([row[late - 1] - row[early - 1] for row in loss.tolist()])


def zero_by_mask(z, hook, head):
    mask = torch.ones(z.shape[2])
    mask[head] = 0
    return z * mask[:, None]


def zero_in_place_without_return(z, hook, head):
    z[..., head, :] *= 0


def mean_by_einsum(z, hook, head, reference):
    mean = torch.einsum("npd->pd", reference[:, :, head]) / len(reference)
    z = z.clone()
    for prompt in range(len(z)):
        z[prompt, :, head] = mean
    return z


def effect_by_interpolation(patched, clean, corrupted):
    return 1 - (clean - patched) / (clean - corrupted)


def patch_by_repeating(activation, hook, clean, head, n_heads):
    group = n_heads // activation.shape[2]
    owner = torch.arange(activation.shape[2]).repeat_interleave(group)[head]
    return torch.where((torch.arange(activation.shape[2]) == owner)[:, None], clean, activation)


RIGHT = [
    (checks.icl_score, icl_by_lists),
    (checks.zero_ablation, zero_by_mask),
    (checks.zero_ablation, zero_in_place_without_return),
    (checks.mean_ablation, mean_by_einsum),
    (checks.normalised_effect, effect_by_interpolation),
    (checks.patch_head_input, patch_by_repeating),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda x: getattr(x, "__name__", str(x)))
def test_right_answers_are_right(check, answer, capsys):
    assert told(capsys, check, answer) == f"{check}: right."


# Wrong answers


def icl_one_late(loss, early, late):
    return loss[:, late] - loss[:, early]


def icl_early_minus_late(loss, early, late):
    return loss[:, early - 1] - loss[:, late - 1]


def icl_averaged(loss, early, late):
    return (loss[:, late - 1] - loss[:, early - 1]).mean()


def icl_of_prefixes(loss, early, late):
    return loss[:, late - 1 :].mean(dim=1) - loss[:, :early].mean(dim=1)


def zero_a_position(z, hook, head):
    z[:, head] = 0
    return z


def zero_every_head(z, hook, head):
    return z * 0


def zero_last_axis(z, hook, head):
    z[..., head] = 0
    return z


def zero_the_rest(z, hook, head):
    kept = z[:, :, head].clone()
    z[:] = 0
    z[:, :, head] = kept
    return z


def zero_at_the_end(z, hook, head):
    z[:, -1, head, :] = 0
    return z


def zero_a_copy_and_forget_it(z, hook, head):
    z = z.clone()
    z[:, :, head] = 0


def mean_is_zero(z, hook, head, reference):
    z[:, :, head] = 0.0
    return z


def mean_of_this_run(z, hook, head, reference):
    z[:, :, head] = z[:, :, head].mean(0)
    return z


def mean_over_positions_too(z, hook, head, reference):
    z[:, :, head] = reference[:, :, head].mean(dim=(0, 1))
    return z


def mean_over_heads(z, hook, head, reference):
    z[:, :, head] = reference.mean(0).mean(1)
    return z


def mean_for_every_head(z, hook, head, reference):
    z[:] = reference.mean(0)
    return z


def mean_of_one_prompt(z, hook, head, reference):
    z[:, :, head] = reference[0, :, head]
    return z


def effect_swapped(patched, clean, corrupted):
    return (clean - patched) / (clean - corrupted)


def effect_not_scaled(patched, clean, corrupted):
    return patched - corrupted


def effect_as_share(patched, clean, corrupted):
    return patched / clean


def effect_upside_down(patched, clean, corrupted):
    return (patched - corrupted) / (corrupted - clean)


def patch_query_index(activation, hook, clean, head, n_heads):
    activation[:, :, head] = clean[:, :, head]
    return activation


def patch_all(activation, hook, clean, head, n_heads):
    return clean


def patch_by_number_of_groups(activation, hook, clean, head, n_heads):
    index = head // activation.shape[2]
    activation[:, :, index] = clean[:, :, index]
    return activation


def patch_at_the_end(activation, hook, clean, head, n_heads):
    index = head // (n_heads // activation.shape[2])
    activation[:, -1, index] = clean[:, -1, index]
    return activation


def patch_the_clean_run(activation, hook, clean, head, n_heads):
    index = head // (n_heads // activation.shape[2])
    clean = clean.clone()
    clean[:, :, index] = activation[:, :, index]
    return clean


WRONG = [
    (checks.icl_score, icl_one_late, "one token late"),
    (checks.icl_score, icl_early_minus_late, "sign is turned round"),
    (checks.icl_score, icl_averaged, "one score per prompt"),
    (checks.icl_score, icl_of_prefixes, "the two tokens themselves"),
    (checks.zero_ablation, zero_a_position, "a position instead of a head"),
    (checks.zero_ablation, zero_every_head, "every head of the layer"),
    (checks.zero_ablation, zero_last_axis, "one dimension of every head"),
    (checks.zero_ablation, zero_the_rest, "the other way round"),
    (checks.zero_ablation, zero_at_the_end, "last position only"),
    (checks.zero_ablation, zero_a_copy_and_forget_it, "return the edited copy"),
    (checks.mean_ablation, mean_is_zero, "That is a zero ablation"),
    (checks.mean_ablation, mean_of_this_run, "*reference* prompts"),
    (checks.mean_ablation, mean_over_positions_too, "one mean per position"),
    (checks.mean_ablation, mean_over_heads, "over the heads too"),
    (checks.mean_ablation, mean_for_every_head, "only `head` should change"),
    (checks.mean_ablation, mean_of_one_prompt, "resample ablation"),
    (checks.normalised_effect, effect_swapped, "Clean and corrupted are swapped"),
    (checks.normalised_effect, effect_not_scaled, "divide by the gap"),
    (checks.normalised_effect, effect_as_share, "share of the clean figure"),
    (checks.normalised_effect, effect_upside_down, "divide by clean minus corrupted"),
    (checks.patch_head_input, patch_query_index, "neighbouring query heads"),
    (checks.patch_head_input, patch_all, "every head of the layer"),
    (checks.patch_head_input, patch_by_number_of_groups, "how many query heads share"),
    (checks.patch_head_input, patch_at_the_end, "last position only"),
    (checks.patch_head_input, patch_the_clean_run, "Clean and corrupted are swapped"),
]


@pytest.mark.parametrize(
    ("check", "answer", "message"), WRONG, ids=lambda x: getattr(x, "__name__", None)
)
def test_wrong_answers_are_told_what_is_wrong(check, answer, message, capsys):
    said = told(capsys, check, answer)
    assert said.startswith(f"{check}: not right yet. ")
    assert message in said
