"""Small figures of a circuit: values of some heads, where they look, how far from the model."""

import pandas as pd
import pytest
import torch

from utils.attribution import attention_table, of_heads
from utils.circuit import gap_by_prompt
from utils.heads import Head

VALUES = torch.arange(24.0).reshape(2, 3, 4)  # [prompt layer head]
POSITIONS = {"A": torch.tensor([0, 1]), "B": torch.tensor([1, 0]), "END": torch.tensor([2, 2])}


def test_values_of_heads_come_in_their_order():
    got = of_heads(VALUES, [Head(2, 1), (0, 3)])
    torch.testing.assert_close(got, torch.tensor([[9.0, 3.0], [21.0, 15.0]]))


def some_patterns():
    """L1H0 looks from END at A and L0H1 at B, which stand elsewhere in each prompt."""
    patterns = torch.zeros(2, 2, 2, 3, 3)  # [prompt layer head dest src]
    patterns[0, 1, 0, 2] = torch.tensor([0.7, 0.2, 0.1])
    patterns[1, 1, 0, 2] = torch.tensor([0.4, 0.5, 0.1])
    patterns[0, 0, 1, 2] = torch.tensor([0.02, 0.05, 0.93])
    patterns[1, 0, 1, 2] = torch.tensor([0.05, 0.02, 0.93])
    return patterns


HEADS = [Head(1, 0), Head(0, 1)]


@pytest.mark.parametrize(("least", "of_l0h1"), [(0.0, "B"), (0.1, "-")])
def test_attention_table_says_where_heads_look(least, of_l0h1):
    got = attention_table(some_patterns(), POSITIONS, HEADS, "END", ["A", "B"], least)
    columns = {"A": [0.6, 0.02], "B": [0.3, 0.05], "looks at": ["A", of_l0h1]}
    want = pd.DataFrame(columns, index=["L1H0", "L0H1"])
    pd.testing.assert_frame_equal(got, want, check_dtype=False)


def test_the_gap_is_over_the_roles_and_a_share_of_the_model():
    f = torch.tensor
    pairs = {
        "none": (f([9.0, 9.0]), f([-5.0, -3.0])),  # the whole model: -4
        "one": (f([1.0, 3.0]), f([3.0, 6.0])),  # the circuit is lower by 2 and 3
        "two": (f([2.0, -1.0]), f([0.0, 0.0])),  # and here higher by 2, and lower by 1
    }
    torch.testing.assert_close(gap_by_prompt(pairs), f([(2 + 2) / 2, (3 - 1) / 2]) / 4)
    assert gap_by_prompt(pairs).mean() == pytest.approx((2.5 + 0.5) / 2 / 4)
    assert gap_by_prompt({"none": pairs["none"]}).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: of_heads(VALUES, [(3, 0)]), r"heads' layers must lie in 0\.\.2"),
        (lambda: attention_table(some_patterns(), POSITIONS, HEADS, "A", ["C"]), "no 'C'"),
        (lambda: attention_table(some_patterns(), POSITIONS, HEADS, "D", ["A"]), "no 'D'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
