"""The untouched Hugging Face model under plain forward hooks: what our results have to equal."""

from contextlib import ExitStack

import torch

HEAD_SITES = ("z", "q", "k", "v")


def blocks(hf):
    return hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers


def attention(block):
    return block.attn if hasattr(block, "attn") else block.self_attn


def place(hf, layer, site):
    """The module that a site is the input or output of: module, whether input, which columns."""
    block = blocks(hf)[layer]
    attn, width = attention(block), hf.config.hidden_size
    gpt2 = hasattr(hf, "transformer")
    if site in ("resid_pre", "resid_post"):
        return block, site == "resid_pre", slice(None)
    if site == "mlp_out":
        return block.mlp, False, slice(None)
    if site == "attn_out":
        return attn, False, slice(None)
    if site == "z":
        return (attn.c_proj if gpt2 else attn.o_proj), True, slice(None)
    if gpt2:  # q, k and v side by side
        start = width * "qkv".index(site)
        return attn.c_attn, False, slice(start, start + width)
    return getattr(attn, f"{site}_proj"), False, slice(None)


def value_bias(hf, layer):
    """What each head writes whatever it attends to, [head d_head]: no part of v and z in ours.

    (Compatibility mode moves it behind the heads, so that z = 0 there is z = this here.)
    """
    if not hasattr(hf, "transformer"):
        return 0.0
    block, width = blocks(hf)[layer], hf.config.hidden_size
    bias = block.ln_1.bias @ block.attn.c_attn.weight + block.attn.c_attn.bias
    return bias[2 * width :].reshape(hf.config.num_attention_heads, -1)


def final_norm(hf):
    return hf.transformer.ln_f if hasattr(hf, "transformer") else hf.model.norm


def out_weight(hf, layer):
    """W_O of a layer: [head d_head d_model]."""
    attn = attention(blocks(hf)[layer])
    weight = attn.c_proj.weight if hasattr(hf, "transformer") else attn.o_proj.weight.T
    return weight.unflatten(0, (hf.config.num_attention_heads, -1))


def run(hf, tokens, edit=None, site="z"):
    """Logits, with `edit(layer, x)` put in place of a site of every layer.

    x is [prompt pos head d_head] at a site of heads, else [prompt pos d_model].
    """
    d_head = hf.config.hidden_size // hf.config.num_attention_heads

    def edited(layer, x):
        if site not in HEAD_SITES:
            return edit(layer, x)
        constant = value_bias(hf, layer) if site in ("z", "v") else 0.0
        return (edit(layer, x.unflatten(-1, (-1, d_head)) - constant) + constant).flatten(-2)

    def hook_for(layer, columns):
        def hook_fn(module, given, out=None):
            whole = given if out is None else out
            x, *rest = whole if isinstance(whole, tuple) else (whole,)
            x = x.clone()
            x[..., columns] = edited(layer, x[..., columns])
            return (x, *rest) if isinstance(whole, tuple) else x

        return hook_fn

    with ExitStack() as stack:
        for layer in range(len(blocks(hf)) if edit else 0):
            module, is_input, columns = place(hf, layer, site)
            add = module.register_forward_pre_hook if is_input else module.register_forward_hook
            stack.callback(add(hook_for(layer, columns)).remove)
        return hf(tokens).logits


def recorded(hf, tokens, site="z"):
    """A site of every layer: [prompt layer pos head d_head], or [prompt layer pos d_model]."""
    kept = []
    run(hf, tokens, lambda layer, x: kept.append(x.clone()) or x, site)
    return torch.stack(kept, dim=1)


def log_probs(hf, tokens, edit=None, site="z"):
    return run(hf, tokens, edit, site).log_softmax(-1)
