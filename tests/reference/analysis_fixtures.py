"""What the analysis of sections 4.2, 4.3 and A.3 to A.5 must find in the models of make_fixtures.py: from whole attention
matrices, hooks and singular values, none of which the C code has.

make_fixtures.py calls analysis_of for each case and writes what it returns to tests/fixtures/analysis/.

Shapes: B batch, T positions, L layers, C d_model, HQ / HK query / key-value heads, D head_dim.
"""
import torch

NEAREST = 1e-8  # no |Y| may lie nearer to a bound of Fig. 5: rounding would decide what is counted
STREAMS = ("attention_output", "attention_residual", "ffn_output", "ffn_residual")


def record(model, case):
    """Hooks that keep, layer by layer, what passes; returns the dictionary they fill and their handles."""
    kept = {name: [] for name in STREAMS + ("value", "key", "y", "y_gated", "modulated", "modulated_gated")}
    handles = []

    def keep(name, pick):
        return lambda module, args, out=None: kept[name].append(pick(args, out).detach().double())

    def head_rows(args, out):
        return out.unflatten(-1, (case["n_kv_heads"], case["head_dim"]))

    for layer in model.model.layers:
        attention = layer.self_attn
        # A hook registered last runs last: it sees what gate, clip and norm have made of the output.
        handles += [
            attention.v_proj.register_forward_hook(keep("value", head_rows)),
            attention.k_norm.register_forward_hook(keep("key", lambda args, out: out)),
            attention.o_proj.register_forward_pre_hook(keep("y", lambda args, out: args[0]), prepend=True),
            attention.o_proj.register_forward_pre_hook(keep("y_gated", lambda args, out: args[0])),
            attention.o_proj.register_forward_hook(keep("attention_output", lambda args, out: out)),
            layer.post_attention_layernorm.register_forward_pre_hook(
                keep("attention_residual", lambda args, out: args[0])
            ),
            layer.mlp.down_proj.register_forward_hook(keep("ffn_output", lambda args, out: out)),
            layer.register_forward_hook(keep("ffn_residual", lambda args, out: out[0])),
        ]
        if hasattr(attention, "gate"):
            handles += [
                attention.gate.register_forward_hook(keep("modulated", lambda args, out: args[1])),
                attention.gate.register_forward_hook(keep("modulated_gated", lambda args, out: out)),
            ]
    return kept, handles


def attention_figures(attentions):
    """received (L, HQ, T): mean over the queries that see the key; entropy (L, HQ)."""
    P = torch.stack(attentions).detach().double()  # (L, B, HQ, T, T)
    T = P.shape[-1]
    seen = torch.arange(T, 0, -1, dtype=torch.float64)
    entropy = -torch.where(P > 0, P * P.clamp_min(1e-300).log(), 0).sum(-1)
    return {"received": P.sum(-2).mean(1) / seen, "entropy": entropy.mean((1, 3))}


def norm_figures(kept):
    """(L, HK, T): mean over the batch. RoPE turns the key, which keeps its length."""
    return {f"{name}_norm": torch.stack([x.norm(dim=-1).mean(0).T for x in kept[name]]) for name in ("value", "key")}


def stream_figures(kept, tokens):
    figures = {}
    for name in STREAMS:
        size = torch.stack(kept[name]).abs()  # (L, B, T, C)
        L, B, T, C = size.shape
        at = size.flatten(1).argmax(1)
        figures |= {
            f"{name}.max": size.flatten(1).max(1).values,
            f"{name}.max_at": size.amax((1, 3)),
            f"{name}.max_in": size.amax((1, 2)),
            f"{name}.position": (at // C % T).int(),
            f"{name}.dimension": (at % C).int(),
            f"{name}.token": tokens.flatten()[at // C].int(),
        }
    return figures


def magnitude_figures(case, kept, scores):
    """Fig. 4 and 5: mean |Y| and the shares below 1e-2 and 1e-3, a value for each layer."""
    gated = case["gate_position"] != "none"
    before = kept["modulated"] or kept["y"]
    stages = {"before": before}
    if gated:
        stages["after"] = kept["modulated_gated"] or kept["y_gated"]
    if scores and case["gate_form"] == "multiplicative":
        stages["mean_gate"] = [y * s.double().mean() for y, s in zip(before, scores)]
    figures = {}
    for name, values in stages.items():
        size = torch.stack([y.flatten() for y in values]).abs()
        figures[f"{name}.magnitude"] = size.mean(1)
        for bound in (1e-2, 1e-3):
            assert (size - bound).abs().min() > NEAREST, "a value too near to a bound: change SEED"
            figures[f"{name}.below_{bound:g}"] = (size < bound).double().mean(1)
    return figures


def effective_rank(matrix):
    sigma = torch.linalg.svdvals(matrix)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return (-(p * p.log()).sum()).exp()


def rank_figures(model, case, kept):
    """Eq. 6, (L, HQ): of W_V^k W_O^k, and of each head's output over all positions, before and behind a gate at G1."""
    D, HQ, group = case["head_dim"], case["n_heads"], case["n_heads"] // case["n_kv_heads"]
    names = ["weights", "before"] + ["after"] * (case["gate_position"] == "G1")
    ranks = {name: [] for name in names}
    for l, layer in enumerate(model.model.layers):
        W_V = layer.self_attn.v_proj.weight.detach().double().unflatten(0, (-1, D))
        W_O = layer.self_attn.o_proj.weight.detach().double().unflatten(1, (-1, D))
        for h in range(HQ):
            out = W_O[:, h].T
            inputs = {"weights": W_V[h // group].T}
            for name, source in (("before", "y"), ("after", "y_gated")):
                inputs[name] = kept[source][l].flatten(0, 1).unflatten(1, (-1, D))[:, h]
            for name in names:
                ranks[name].append(effective_rank(inputs[name] @ out))
    return {f"rank.{name}": torch.stack(values).view(-1, HQ) for name, values in ranks.items()}


def gate_figures(case, scores):
    """Fig. 7 by head, (L, heads with scores of their own)."""
    if not scores:
        return {}
    s = torch.stack([x.double() for x in scores])  # (L, B, T, heads, width)
    if case["gate_input"] == "scalar":
        s = s[:, :, :, :1]
    return {
        "gate_mean_by_head": s.mean((1, 2, 4)),
        "gate_std_by_head": s.std((1, 2, 4), correction=0),
        "gate_min_by_head": s.amin((1, 2, 4)),
        "gate_max_by_head": s.amax((1, 2, 4)),
    }


def analysis_of(model, case, tokens):
    gates = [getattr(layer.self_attn, "gate", None) for layer in model.model.layers]
    kept, handles = record(model, case)
    with torch.no_grad():
        out = model(input_ids=tokens, output_attentions=True)
    for handle in handles:
        handle.remove()
    scores = [gate.scores for gate in gates if gate is not None]
    figures = attention_figures(out.attentions) | norm_figures(kept) | stream_figures(kept, tokens)
    figures |= magnitude_figures(case, kept, scores) | rank_figures(model, case, kept) | gate_figures(case, scores)
    return {name: x.int() if x.dtype == torch.int32 else x.float() for name, x in figures.items()}


def scores_hook(change):
    """The gate once more, with change(scores) in the scores' place."""

    def hook(module, args, out):
        y = args[1].view(*module.scores.shape[:2], module.heads, -1)
        scores = change(module.scores)
        return (y + scores if module.case["gate_form"] == "additive" else y * scores).reshape(args[1].shape)

    return hook


def without_first_value(module, args, out):
    out = out.clone()
    out[:, 0] = 0
    return out


def silence(head, width):
    def hook(module, args):
        y = args[0].clone()
        y[..., head * width : (head + 1) * width] = 0
        return (y,)

    return hook


def interventions_of(model, case, tokens, loss_of):
    """The loss after each change; loss_of(logits) is the loss. Changes concern all layers but where a layer is named."""
    attentions = [layer.self_attn for layer in model.model.layers]
    gates = [attention.gate for attention in attentions if hasattr(attention, "gate")]
    T, last = tokens.shape[1], case["n_heads"] - 1
    changes = {
        "value": lambda: [a.v_proj.register_forward_hook(without_first_value) for a in attentions],
        "value_layer1": lambda: [attentions[1].v_proj.register_forward_hook(without_first_value)],
        "silent_layer0": lambda: [
            attentions[0].o_proj.register_forward_pre_hook(silence(last, case["head_dim"]))
        ],
        "silent_all": lambda: [
            a.o_proj.register_forward_pre_hook(silence(0, case["n_heads"] * case["head_dim"])) for a in attentions
        ],
        "key": lambda: [],
    }
    if gates:
        means = [gate.scores.double().mean().float() for gate in gates]  # of the unchanged pass
        changes["gate_mean"] = lambda: [
            g.register_forward_hook(scores_hook(lambda s, mean=mean: mean.expand_as(s))) for g, mean in zip(gates, means)
        ]
        changes["gate_one"] = lambda: [g.register_forward_hook(scores_hook(torch.ones_like)) for g in gates]
        if case["gate_form"] == "multiplicative":
            changes["gate_half"] = lambda: [g.register_forward_hook(scores_hook(lambda s: s / 2)) for g in gates]
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
    mask[1:, 0] = torch.finfo(torch.float32).min
    losses = {}
    for name, change in changes.items():
        handles = change()
        with torch.no_grad():
            more = dict(attention_mask=mask.expand(tokens.shape[0], 1, T, T)) if name == "key" else {}
            losses[f"loss.{name}"] = loss_of(model(input_ids=tokens, **more).logits).view(1)
        for handle in handles:
            handle.remove()
    return losses
