"""Mixtures of experts: transformers' own Qwen3Moe, and the two losses of its routers over a global batch (3.1).

Shapes: N positions of the batch, L layers, E experts, K experts of a position.
"""
import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

CLOSEST_CHOICE = 1e-3  # between the logits of the last expert that is chosen and the first that is not


def mixture_config(config, case):
    """The Qwen3MoeConfig with what the dense `config` says."""
    return Qwen3MoeConfig(
        **config.to_diff_dict() | dict(
            num_experts=case["n_experts"],
            num_experts_per_tok=case["experts_per_token"],
            moe_intermediate_size=case["d_ff"],
            norm_topk_prob=bool(case["normalize_top_k"]),
            router_aux_loss_coef=case["load_balance_coef"],
            sliding_window=None,
        ),
        attn_implementation="eager",
    )


def mixture_model(config, case):
    """Each FFN gives its output alone and keeps the logits of its router."""

    def keep(module, args, out):
        module.router_logits = out[1]
        return out[0]

    model = Qwen3MoeForCausalLM(mixture_config(config, case))
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(keep)
    return model


def router_logits(model):
    return [layer.mlp.router_logits for layer in model.model.layers]  # each (N, E)


def choices(logits, case):
    """How many positions chose each expert."""
    chosen = logits.topk(case["experts_per_token"], dim=-1).indices
    return F.one_hot(chosen, case["n_experts"]).sum((0, 1))


def load_balancing_loss(logits, case):
    """E sum_e f_e P_e, micro-batch after micro-batch; f counts the choices of those so far."""
    counts, tokens, losses = 0, 0, []
    for part in logits.chunk(case["gradient_accumulation_steps"]):
        counts, tokens = counts + choices(part, case), tokens + len(part)
        losses.append(case["n_experts"] * (counts / tokens * part.softmax(-1).mean(0)).sum())
    return sum(losses) / len(losses)


def z_loss(logits):
    return logits.logsumexp(-1).pow(2).mean()


def router_losses(model, case):
    """What the routers add to the loss: the mean over the layers."""
    terms = [
        case["load_balance_coef"] * load_balancing_loss(z, case) + case["router_z_coef"] * z_loss(z)
        for z in router_logits(model)
    ]
    return sum(terms) / len(terms)


def routing(model, case):
    """Of the whole batch, by layer."""
    layers = [z.detach() for z in router_logits(model)]
    whole = case | dict(gradient_accumulation_steps=1)
    for z in layers:
        ordered = z.sort(descending=True).values
        k = case["experts_per_token"]
        if k < case["n_experts"]:
            assert (ordered[:, k - 1] - ordered[:, k]).min() > CLOSEST_CHOICE, "a choice too close: change the case"
        ours, theirs = load_balancing_loss(z, whole), load_balancing_loss_func((z,), case["n_experts"], k)
        assert torch.allclose(ours, theirs, rtol=1e-5), (ours, theirs)
    return {
        "expert_rows": torch.stack([choices(z, case) for z in layers]).int(),
        "load_balance_by_layer": torch.stack([load_balancing_loss(z, whole) for z in layers]),
        "router_z_by_layer": torch.stack([z_loss(z) for z in layers]),
    }
