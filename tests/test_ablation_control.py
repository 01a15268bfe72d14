"""The sizes of ablation for which a random control exists."""

import pytest

from utils.ablation import control_sizes, random_control
from utils.heads import Head


def test_there_is_a_control_for_these_sizes_and_no_others(random_gpt2):
    """Layers of four heads: two of layer 0 and three of layer 1 are ranked."""
    ranked = [Head(1, 0), Head(0, 3), Head(1, 2), Head(0, 0), Head(1, 1)]
    sizes = control_sizes(random_gpt2, ranked, (1, 2, 3, 4, 5))
    assert sizes == [1, 2]  # two heads of layer 1 would need two more beside the three
    for k in sizes:
        (draw,) = random_control(random_gpt2, ranked[:k], n_draws=1, exclude=ranked)
        assert not set(draw) & set(ranked)
    with pytest.raises(ValueError, match="layer 1 has 1 other heads, 2 are wanted"):
        random_control(random_gpt2, ranked[:3], n_draws=1, exclude=ranked)
    assert control_sizes(random_gpt2, [(2, head) for head in range(4)], (1, 2)) == []


@pytest.mark.parametrize(
    ("ranked", "message"), [([], "ranked is empty"), ([(0, 4)], "no head L0H4")]
)
def test_bad_heads_are_named(random_gpt2, ranked, message):
    with pytest.raises(ValueError, match=message):
        control_sizes(random_gpt2, ranked, (1, 2))
