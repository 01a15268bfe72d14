"""The IOI exercises: answers as a learner would write them, right and wrong, and what is said."""

import pytest
import torch

import ioi_exercises as checks


def told(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


# Right answers, each by another way than the reference


def difference_by_loop(logits, answers):
    pairs = zip(logits, answers, strict=True)
    return torch.stack([row[-1, io] - row[-1, s] for row, (io, s) in pairs])


def difference_of_log_probs(logits, answers):
    picked = logits[:, -1].log_softmax(-1).gather(1, answers)
    return picked[:, 0] - picked[:, 1]


def attribution_by_einsum(z, w_o, scale, direction):
    return torch.einsum("ph,hd,pd->p", z, w_o, direction / scale[:, None])


def corrupt_by_loop(tokens, positions):
    tokens = tokens.clone()
    for row, s2, io in zip(tokens, positions["S2"], positions["IO"], strict=True):
        row[s2] = row[io]
    return tokens


def patch_head_in_place(z, hook, clean_z, head):
    z[:, :, head] = clean_z[:, :, head]


def patch_head_by_mask(z, hook, clean_z, head):
    return torch.where((torch.arange(z.shape[2]) == head)[:, None], clean_z, z)


def patch_position_by_loop(resid, hook, clean_resid, positions):
    for row, clean_row, position in zip(resid, clean_resid, positions, strict=True):
        row[position] = clean_row[position]
    return resid


def path_in_place(z, hook, original, new, sender):
    z[:] = original[hook.layer()]
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]


def copying_by_rank(resid, w_v, w_o, w_u, names, k):
    logits = resid @ (w_v @ w_o) @ w_u
    own = logits.gather(1, names[:, None])
    return ((logits > own).sum(-1) < k).float().mean()


def ablation_by_index(z, hook, means, keep):
    z[~keep] = means[~keep]
    return z


def ratio_of_sums(circuit, model):
    return float(circuit.sum() / model.sum())


RIGHT = [
    (checks.logit_difference, difference_by_loop),
    (checks.logit_difference, difference_of_log_probs),
    (checks.direct_attribution, attribution_by_einsum),
    (checks.corrupt_s2, corrupt_by_loop),
    (checks.patch_head, patch_head_in_place),
    (checks.patch_head, patch_head_by_mask),
    (checks.patch_position, patch_position_by_loop),
    (checks.path_patch_hook, path_in_place),
    (checks.copying_score, copying_by_rank),
    (checks.mean_ablation, ablation_by_index),
    (checks.faithfulness, ratio_of_sums),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda x: getattr(x, "__name__", str(x)))
def test_right_answers_are_right(check, answer, capsys):
    assert told(capsys, check, answer) == f"{check}: right."


# Wrong answers


def difference_of_probabilities(logits, answers):
    picked = logits[:, -1].softmax(-1).gather(1, answers)
    return picked[:, 0] - picked[:, 1]


def difference_turned_round(logits, answers):
    picked = logits[:, -1].gather(1, answers)
    return picked[:, 1] - picked[:, 0]


def difference_at_the_start(logits, answers):
    picked = logits[:, 0].gather(1, answers)
    return picked[:, 0] - picked[:, 1]


def difference_crossed(logits, answers):
    return logits[:, -1, answers[:, 0]] - logits[:, -1, answers[:, 1]]


def difference_averaged(logits, answers):
    return difference_by_loop(logits, answers).mean()


def attribution_unscaled(z, w_o, scale, direction):
    return (z @ w_o * direction).sum(-1)


def attribution_multiplied(z, w_o, scale, direction):
    return (z @ w_o * direction).sum(-1) * scale


def attribution_crossed(z, w_o, scale, direction):
    return (z @ w_o / scale[:, None]) @ direction.T


def attribution_cosine(z, w_o, scale, direction):
    unit = torch.nn.functional.normalize(direction, dim=-1)
    return (z @ w_o * unit).sum(-1) / scale


def corrupt_in_place(tokens, positions):
    rows = torch.arange(len(tokens))
    tokens[rows, positions["S2"]] = tokens[rows, positions["IO"]]
    return tokens


def corrupt_without_rows(tokens, positions):
    tokens = tokens.clone()
    tokens[:, positions["S2"]] = tokens[:, positions["IO"]]
    return tokens


def corrupt_s1(tokens, positions):
    tokens, rows = tokens.clone(), torch.arange(len(tokens))
    tokens[rows, positions["S1"]] = tokens[rows, positions["IO"]]
    return tokens


def corrupt_io(tokens, positions):
    tokens, rows = tokens.clone(), torch.arange(len(tokens))
    tokens[rows, positions["IO"]] = tokens[rows, positions["S2"]]
    return tokens


def corrupt_with_positions(tokens, positions):
    tokens = tokens.clone()
    tokens[torch.arange(len(tokens)), positions["S2"]] = positions["IO"]
    return tokens


def patch_the_layer(z, hook, clean_z, head):
    return clean_z


def patch_a_position(z, hook, clean_z, head):
    z[:, head] = clean_z[:, head]
    return z


def patch_clean_run(z, hook, clean_z, head):
    patched = clean_z.clone()
    patched[:, :, head] = z[:, :, head]
    return patched


def patch_head_at_end(z, hook, clean_z, head):
    z[:, -1, head] = clean_z[:, -1, head]
    return z


def patch_copy_and_forget(z, hook, clean_z, head):
    z = z.clone()
    z[:, :, head] = clean_z[:, :, head]


def patch_without_rows(resid, hook, clean_resid, positions):
    resid[:, positions] = clean_resid[:, positions]
    return resid


def patch_first_position(resid, hook, clean_resid, positions):
    resid[:, positions[0]] = clean_resid[:, positions[0]]
    return resid


def patch_every_position(resid, hook, clean_resid, positions):
    resid[:] = clean_resid
    return resid


def path_not_frozen(z, hook, original, new, sender):
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]
    return z


def path_every_layer(z, hook, original, new, sender):
    z = original[hook.layer()].clone()
    z[:, :, sender.head] = new[hook.layer()][:, :, sender.head]
    return z


def path_whole_layer(z, hook, original, new, sender):
    source = new if hook.layer() == sender.layer else original
    return source[hook.layer()]


def path_layer_left_free(z, hook, original, new, sender):
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]
        return z
    return original[hook.layer()]


def path_frozen_only(z, hook, original, new, sender):
    return original[hook.layer()]


def path_into_the_cache(z, hook, original, new, sender):
    z = original[hook.layer()]
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]
    return z


def copying_without_the_head(resid, w_v, w_o, w_u, names, k):
    top = (resid @ w_u).topk(k).indices
    return (top == names[:, None]).any(-1).float().mean()


def copying_any_name(resid, w_v, w_o, w_u, names, k):
    top = (resid @ w_v @ w_o @ w_u).topk(k).indices
    return torch.isin(top, names).any(-1).float().mean()


def copying_argmax(resid, w_v, w_o, w_u, names, k):
    return ((resid @ w_v @ w_o @ w_u).argmax(-1) == names).float().mean()


def copying_share_of_k(resid, w_v, w_o, w_u, names, k):
    top = (resid @ w_v @ w_o @ w_u).topk(k).indices
    return (top == names[:, None]).float().mean()


def copying_bottom(resid, w_v, w_o, w_u, names, k):
    bottom = (resid @ w_v @ w_o @ w_u).topk(k, largest=False).indices
    return (bottom == names[:, None]).any(-1).float().mean()


def ablation_inverted(z, hook, means, keep):
    z[keep] = means[keep]
    return z


def ablation_zero(z, hook, means, keep):
    z[~keep] = 0
    return z


def ablation_means_averaged(z, hook, means, keep):
    return torch.where(keep[..., None], z, means.mean(0))


def ablation_kept_anywhere(z, hook, means, keep):
    kept = keep.any(0)
    return torch.where(kept[..., None], z, means)


def ablation_everything(z, hook, means, keep):
    return means


def faithfulness_mean_of_ratios(circuit, model):
    return (circuit / model).mean().item()


def faithfulness_inverse(circuit, model):
    return (model.mean() / circuit.mean()).item()


def faithfulness_gap(circuit, model):
    return abs(model.mean() - circuit.mean()).item()


def faithfulness_lost(circuit, model):
    return ((model.mean() - circuit.mean()) / model.mean()).item()


WRONG = [
    (checks.logit_difference, difference_of_probabilities, "no softmax"),
    (checks.logit_difference, difference_turned_round, "signs are turned round"),
    (checks.logit_difference, difference_at_the_start, "first position"),
    (checks.logit_difference, difference_crossed, "each prompt's own pair"),
    (checks.logit_difference, difference_averaged, "one difference per prompt"),
    (checks.direct_attribution, attribution_unscaled, "scale of the final LayerNorm is missing"),
    (checks.direct_attribution, attribution_multiplied, "You multiply by the scale"),
    (checks.direct_attribution, attribution_crossed, "each prompt has its own names"),
    (checks.direct_attribution, attribution_cosine, "unit vector"),
    (checks.corrupt_s2, corrupt_in_place, "work on a copy"),
    (checks.corrupt_s2, corrupt_without_rows, "index the rows too"),
    (checks.corrupt_s2, corrupt_s1, "first mention"),
    (checks.corrupt_s2, corrupt_io, "the other way round"),
    (checks.corrupt_s2, corrupt_with_positions, "the *position* of IO"),
    (checks.patch_head, patch_the_layer, "only `head` should change"),
    (checks.patch_head, patch_a_position, "a position instead of a head"),
    (checks.patch_head, patch_clean_run, "Clean and corrupted are swapped"),
    (checks.patch_head, patch_head_at_end, "last position only"),
    (checks.patch_head, patch_copy_and_forget, "return the edited copy"),
    (checks.patch_position, patch_without_rows, "index the rows too"),
    (checks.patch_position, patch_first_position, "first prompt's position"),
    (checks.patch_position, patch_every_position, "You patched every position"),
    (checks.path_patch_hook, path_not_frozen, "That is activation patching"),
    (checks.path_patch_hook, path_every_layer, "one layer only"),
    (checks.path_patch_hook, path_whole_layer, "only `sender.head` should be"),
    (checks.path_patch_hook, path_layer_left_free, "start from `original` there too"),
    (checks.path_patch_hook, path_frozen_only, "the sender too, so nothing changes"),
    (checks.path_patch_hook, path_into_the_cache, "work on a copy"),
    (checks.copying_score, copying_without_the_head, "through the head first"),
    (checks.copying_score, copying_any_name, "the name of that row"),
    (checks.copying_score, copying_argmax, "anywhere among the `k` largest"),
    (checks.copying_score, copying_share_of_k, "divided by k as well"),
    (checks.copying_score, copying_bottom, "k smallest logits"),
    (checks.mean_ablation, ablation_inverted, "the other way round"),
    (checks.mean_ablation, ablation_zero, "That is a zero ablation"),
    (checks.mean_ablation, ablation_means_averaged, "mean of its own template"),
    (checks.mean_ablation, ablation_kept_anywhere, "a row for each prompt"),
    (checks.mean_ablation, ablation_everything, "what `keep` marks stays"),
    (checks.faithfulness, faithfulness_mean_of_ratios, "the mean of the ratios"),
    (checks.faithfulness, faithfulness_inverse, "upside down"),
    (checks.faithfulness, faithfulness_gap, "the paper's distance"),
    (checks.faithfulness, faithfulness_lost, "the share that is lost"),
]


@pytest.mark.parametrize(
    ("check", "answer", "message"), WRONG, ids=lambda x: getattr(x, "__name__", None)
)
def test_wrong_answers_are_told_what_is_wrong(check, answer, message, capsys):
    said = told(capsys, check, answer)
    assert said.startswith(f"{check}: not right yet. ")
    assert message in said


def test_there_are_nine_exercises_in_order():
    assert sorted(checks.EXERCISES.all) == list(range(1, 10))
    for number, exercise in checks.EXERCISES.all.items():
        assert exercise.number == number
        assert len(exercise.mistakes) >= 3
        assert any(exercise is getattr(checks, name) for name in checks.__all__)
