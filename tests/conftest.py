"""Models that the tests share, each loaded once."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
)

from utils.models import load_hf, load_model


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M in compatibility mode: rotary positions, RMSNorm, grouped keys and values."""
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def smollm2_hf():
    """The same weights, untouched, for reference computations."""
    return load_hf("smollm2-135m")[0].model


@pytest.fixture(scope="session")
def random_gpt2_folder(tmp_path_factory):
    """A random GPT-2 (learned positions, LayerNorm, biases) with SmolLM2's tokenizer."""
    tokenizer = load_hf("smollm2-135m")[0].tokenizer
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=64,
        n_positions=256,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    # GPT-2 starts with zero biases and unit scales, which would hide mistakes with either.
    for name, parameter in model.named_parameters():
        centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("random") / "random-gpt2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_gpt2(random_gpt2_folder):
    """That model in compatibility mode."""
    return load_model(str(random_gpt2_folder), device="cpu")


@pytest.fixture(scope="session")
def random_gpt2_hf(random_gpt2_folder):
    """That model, untouched, for reference computations."""
    return load_hf(str(random_gpt2_folder))[0].model


@pytest.fixture(scope="session")
def random_bridge(smollm2):
    """A function from a configuration to a model with random weights, in compatibility mode."""

    def build(config):
        torch.manual_seed(0)
        bridge = TransformerBridge.boot_transformers(
            "random",
            hf_model=AutoModelForCausalLM.from_config(config),
            tokenizer=smollm2.tokenizer,
            dtype=torch.float32,
        )
        bridge.enable_compatibility_mode()
        return bridge.eval()

    return build


# a small vocabulary, and weights large enough for every path to matter
RANDOM = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 100,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def llama(random_bridge):
    """Grouped keys and values: four query heads share one."""
    return random_bridge(LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **RANDOM))


@pytest.fixture(scope="session")
def neox(random_bridge):
    """Attention and MLP in parallel, partly rotary, LayerNorm with biases."""
    return random_bridge(GPTNeoXConfig(num_attention_heads=4, **RANDOM))


@pytest.fixture(scope="session")
def toy2():
    """An untrained two-layer attention-only model."""
    from utils.toy import build_toy  # its module is only needed by tests that use a toy

    return build_toy(n_layers=2, seed=0)


@pytest.fixture(params=["smollm2", "random_gpt2", "llama", "neox", "toy2"])
def every_model(request):
    """Each kind of model in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["random_gpt2", "llama", "neox", "toy2"])
def small_model(request):
    """Each kind of model in turn, but only small ones."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def new_neox(random_bridge):
    """`neox` once more, as nobody has used it yet."""
    return random_bridge(GPTNeoXConfig(num_attention_heads=4, **RANDOM))


@pytest.fixture
def draw():
    """A function that draws random prompts, the same for the same arguments."""

    def tokens(model, n_prompts=2, length=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, model.cfg.d_vocab, (n_prompts, length), generator=generator)

    return tokens


@pytest.fixture
def no_forward(monkeypatch):
    """Fails the test when a forward pass is spent."""
    monkeypatch.setattr(
        TransformerBridge, "forward", lambda *_, **__: pytest.fail("a forward pass was spent")
    )


@pytest.fixture(params=["smollm2", "random_gpt2"])
def model_pair(request):
    """A model in compatibility mode, and the untouched Hugging Face model."""
    return request.getfixturevalue(request.param), request.getfixturevalue(request.param + "_hf")


@pytest.fixture
def no_grad():
    """For tests that compute, and never train."""
    with torch.no_grad():
        yield
