"""Slips that no exercise lists are told by their kind, and right answers never are."""

import pytest
import torch

from utils.exercises.diagnosis import difference

AXES = ["prompt", "head", "pos"]
torch.manual_seed(0)
WANT = torch.randn(2, 3, 5)


def part(x, dim, i):
    x = x.clone()
    x.select(dim, i).add_(1.0)
    return x


SLIPS = [  # what was done to the right values, and what is said
    (lambda x: -x, "signs are turned round"),
    (lambda x: 0 * x, "zero everywhere"),
    (lambda x: x.abs(), "absolute values"),
    (lambda x: x**2, "squares"),
    (lambda x: x.exp(), "a logarithm is missing"),
    (lambda x: 1 - x, "one minus"),
    (lambda x: 1 / x, "one over"),
    (lambda x: x.clamp(0, 1), "between 0 and 1"),
    (lambda x: x.clamp(min=0), "below zero"),
    (lambda x: 2.5 * x, "2.5 times too large"),
    (lambda x: x / 5, "5 times too small: divided by the number of pos?"),
    (lambda x: 3 * x, "3 times too large: a sum for a mean over head?"),
    (lambda x: -x / 4, "4 times too small"),
    (lambda x: x + 0.3, "off by the same 0.3"),
    (lambda x: 2 * x + 1, "2 times the right values, and moved"),
    (lambda x: x.roll(1, 2), "1 too late along pos"),
    (lambda x: x.roll(-2, 2), "2 too early along pos"),
    (lambda x: x.flip(1), "back to front along head"),
    (lambda x: x.softmax(1), "softmax over head"),
    (lambda x: x.cumsum(2), "add up along pos"),
    (lambda x: x - x.mean(2, keepdim=True), "subtract the mean over pos"),
    (lambda x: x / x.sum(1, keepdim=True), "divide by the sum over head"),
    (lambda x: x.mean(0, keepdim=True).expand_as(x), "average over prompt; keep"),
    (lambda x: part(x, 1, 0), "Right but for head 0, counted"),
    (lambda x: part(x, 2, 4), "Right but for pos 4 (the last)"),
    (lambda x: x.flatten()[torch.randperm(30)].view_as(x), "right values, in the wrong places"),
    (lambda x: x[:, -1:].expand_as(x), "Every head gets what belongs to the last"),
    (lambda x: (x**2)[:, :, :1].expand_as(x), "the same for every pos"),
    (lambda x: x * torch.rand(1, 3, 1), "each head are off by a factor of its own"),
    (lambda x: x + torch.tensor([[[0.0]], [[5.0]]]), "prompt 1 (the last) are off by an amount"),
    (lambda x: x * torch.rand(x.shape).sub(0.5).sign(), "some of the signs are turned round"),
    (lambda x: x * torch.rand(x.shape), "Off by up to"),
    (lambda x: x[:, [1, 1, 0]], "Along head you have 1, 1, 0; wanted is the order 0, 1, 2"),
    (lambda x: x[:, 1:2].expand_as(x), "Every head gets what belongs to head 1, counted from 0"),
    (lambda x: x + torch.tensor([2.0, 3, 5])[:, None], "an amount of its own (2, 3, 5)"),
    (lambda x: x * torch.tensor([1.0, 3, 5])[:, None], "head 1, 2 are off by a factor of its own"),
    (lambda x: part(x[:, 1:], 0, 0), "Your result has shape"),
    (lambda x: x * (torch.arange(5) > 3), "Right for pos 4 (the last) alone; the rest is zero"),
    (lambda x: x / 2.302585, "to base 10"),
    (lambda x: x.mean(), "You average over everything; keep one value for each prompt and head"),
    (lambda x: x.flatten(), "strung together"),
    (lambda x: x.mean(1), "average over head; keep one value"),
    (lambda x: x.sum(0), "sum over prompt; keep one value"),
    (lambda x: x.permute(2, 0, 1), "axes stand in another order: wanted is [2, 3, 5] [prompt"),
    (lambda x: x[..., None], "axis of length one is too many"),
    (lambda x: x[:, :, 1:], "first entry along pos is missing"),
    (lambda x: x[:, :2], "last entry along head is missing"),
    (lambda x: x[:, 1], "entry 1 of head alone"),
    (lambda x: torch.cat([x, x[:, :1]], 1), "one entry too many: the last along axis 1"),
    (lambda x: x[..., None].expand(2, 3, 5, 4), "average over axis 3"),
    (lambda x: x[..., None].expand(2, 3, 5, 4) / 4, "sum over axis 3"),
    (lambda x: x[:, None] + torch.zeros(2, 2, 3, 5), "average over axis 1"),
    (lambda x: x.new_ones(2, 7), "Your result has shape [2, 7], wanted is a tensor of shape"),
    (lambda x: (x - 9).log(), "30 of 30 values are NaN"),
    (lambda x: x[:0], "Your result is empty"),
    (lambda x: torch.zeros(0), "Your result is empty"),
    (lambda x: x / 0, "30 of 30 values are infinite"),
    (lambda x: x.to(torch.complex64), "take the real part"),
    (lambda x: x.tolist(), "You return a list"),
    (lambda x: 1.5, "Your result has shape [], wanted is a tensor of shape [2, 3, 5]"),
    (lambda x: None, "did you forget `return`"),
]


@pytest.mark.parametrize(("slip", "text"), SLIPS)
def test_a_slip_is_told_by_its_kind(slip, text):
    assert text in difference(slip(WANT), WANT, AXES)


def test_every_entry_with_every_other_is_told():
    rows = torch.randn(4, 6)
    want, broadcast = (rows * rows).sum(-1), rows @ rows.T
    assert "combine every entry with those of all the others" in difference(broadcast, want)


def test_what_is_right_for_the_first_prompt_alone_is_told():
    first = torch.cat([WANT[0][:1], torch.rand(2, 5)])
    assert "Right for head 0 alone" in difference(first, WANT[0], AXES[1:])


def test_a_transposed_square_is_told():
    square = torch.randn(4, 4)
    assert "query and key are exchanged" in difference(square.T, square, ["query", "key"])


def test_one_number_is_not_explained_by_chance():
    assert difference(0.25, torch.tensor(0.5)) == "Off by up to 0.25: it is 0.25, wanted is 0.5."
    assert "wanted is one number" in difference(torch.zeros(2), torch.tensor(0.5))
    assert "signs" in difference(-0.5, torch.tensor(0.5))


def test_whole_numbers_are_wanted_where_the_right_ones_are():
    ids = torch.tensor([3, 5])
    assert "whole ones" in difference(ids.float(), ids)
    assert difference(ids.int(), ids) is None


@pytest.mark.parametrize(
    "same",
    [
        lambda x: x.double(),
        lambda x: x + 1e-6,
        lambda x: x.clone().requires_grad_(),
        lambda x: x.to_sparse(),
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    ],
)
def test_what_is_right_is_right_in_any_form(same):
    assert difference(same(WANT), WANT, AXES) is None


def test_the_axes_of_a_result_may_have_no_names():
    assert "softmax over axis 1" in difference(WANT.softmax(1), WANT, ["*rest"])
