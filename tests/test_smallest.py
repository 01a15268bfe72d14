"""The smallest of everything: one prompt, one layer, one head, two tokens work, or are refused."""

import math
import warnings

import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from utils import ablation, attribution, circuit, heads, metrics, patching, paths, weights
from utils.edits import heads_from
from utils.metrics import LogitDiff

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("error::UserWarning")]
TOKENS, OTHERS, ANSWERS = (torch.tensor([pair]) for pair in ([1, 2], [3, 2], [3, 0]))


@pytest.fixture(scope="module")
def model():
    """One layer of one head, four tokens."""
    sizes = dict(n_layers=1, d_model=8, n_heads=1, d_head=8, d_vocab=4, n_ctx=4, seed=0)
    config = TransformerBridgeConfig(**sizes, attn_only=True, act_fn=None, normalization_type="LN")
    model = TransformerBridge.boot_native(config, device="cpu").eval()
    model.enable_compatibility_mode()
    return model


def test_one_value_has_a_mean_and_no_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = metrics.estimate(torch.tensor([1.5]))
        clustered = metrics.estimate(torch.tensor([1.5]), clusters=torch.tensor([3]))
        of_model = circuit.faithfulness(torch.tensor([1.0]), torch.tensor([2.0]))
    for estimate in (one, clustered, *of_model):
        assert math.isnan(estimate.stderr) and estimate.n == 1
        assert "±" not in str(estimate) and "nan" not in str(estimate)


def test_one_prompt_of_two_tokens_through_one_head(model):
    metric = LogitDiff(ANSWERS)
    clean = metrics.logit_diff(model(TOKENS), ANSWERS)
    other = metrics.logit_diff(model(OTHERS), ANSWERS)
    assert metrics.per_token_loss(model, TOKENS).shape == (1, 1)
    assert heads.score_heads(model, TOKENS, heads.previous_token_score).shape == (1, 1, 1)
    by_head = patching.patch_heads(model, TOKENS, OTHERS, metric)
    assert by_head.shape == (1, 1, 1) and (by_head[0, 0, 0] - other).abs() > 1e-6
    by_place = patching.patch_stream(model, TOKENS, OTHERS, metric)
    torch.testing.assert_close(by_place[:, 0, 1], other)  # the last token is the same
    torch.testing.assert_close(paths.path_patch(model, TOKENS, TOKENS, metric)[0, 0], clean)
    parts = attribution.direct_logit_attribution(model, TOKENS, ANSWERS)
    torch.testing.assert_close(parts.values.sum(1), clean)
    lost = ablation.losses(model, TOKENS, {"none": [], "head": heads_from(model, [(0, 0)], 0.0)})
    torch.testing.assert_close(lost["none"], metrics.per_token_loss(model, TOKENS))
    assert weights.eigenvalue_copying_score(model).shape == (1, 1)


def test_too_little_is_refused(model):
    with pytest.raises(ValueError, match="layer 0 has 0 other heads"):
        ablation.random_control(model, [(0, 0)], 1)
    with pytest.raises(ValueError, match="dest src"):
        heads.score_heads(model, TOKENS[:, :1], heads.previous_token_score)
