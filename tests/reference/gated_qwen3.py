"""The paper's gates on transformers' own Qwen3, in two ways that share no code.

gated_model:  the stock Qwen3ForCausalLM, its attention untouched; hooks on the projections modulate what passes.
              Any gate; the gate's weights are a parameter of their own, `self_attn.gate.weight`.
              A sink logit is one more column of the scores, dropped after the softmax; switch heads are a sum over experts.
packed_model: G1 as the released checkpoints have it, its rows inside a widened q_proj.

Shapes: B batch, T positions, C d_model, HQ / HK query / key-value heads, D head_dim.
"""
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
)

from mixture import mixture_model

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "ns-sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x),
    "identity": lambda x: x,
}


def rope_scaling(case):
    """transformers takes YaRN's factor from max_position_embeddings where the original length is given: both must agree."""
    if "rope_factor" not in case:
        return {}
    assert case["max_seq_len"] == case["rope_factor"] * case["rope_original_length"]
    yarn = dict(rope_type="yarn", factor=case["rope_factor"])
    yarn["original_max_position_embeddings"] = case["rope_original_length"]
    for key in ("beta_fast", "beta_slow", "attention_factor"):
        if f"rope_{key}" in case:
            yarn[key] = case[f"rope_{key}"]
    return dict(rope_scaling=yarn)


def qwen3_config(case, **more):
    """The Qwen3Config of a configuration that is written in this project's keys."""
    more = rope_scaling(case) | more
    return Qwen3Config(
        vocab_size=case["vocab_size"],
        hidden_size=case["d_model"],
        num_hidden_layers=case["n_layers"],
        num_attention_heads=case["n_heads"],
        num_key_value_heads=case["n_kv_heads"],
        head_dim=case["head_dim"],
        intermediate_size=case["d_ff"],
        max_position_embeddings=case["max_seq_len"],
        rope_theta=case["rope_base"],
        rms_norm_eps=case["norm_eps"],
        tie_word_embeddings=bool(case["tied_embeddings"]),
        sliding_window=None,
        attn_implementation="eager",
        use_cache=False,
        **more,
    )


class Gate(nn.Module):
    """Eq. 5: y' = y * activation(x W_theta), and its relatives. Keeps the scores of the last call."""

    def __init__(self, case):
        super().__init__()
        self.case, self.scores = case, None
        position, elementwise = case["gate_position"], case["gate_type"] == "elementwise"
        if position == "G5":
            self.heads, self.width = 1, case["d_model"]
        else:
            self.heads = case["n_heads"] if position in ("G1", "G4") else case["n_kv_heads"]
            self.width = case["head_dim"] if elementwise else 1
        n = self.heads * self.width
        self.inputs = case.get("gate_input_dims") or case["d_model"]
        shape = {"query": (n, self.inputs), "none": (1, n), "scalar": (1, 1)}[case["gate_input"]]
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x, y):
        """x (B, T, C): the normed hidden states. y (B, T, heads * size): what is modulated."""
        B, T, _ = x.shape
        logits = F.linear(x[..., : self.inputs], self.weight) if self.case["gate_input"] == "query" else self.weight
        logits = logits.expand(B, T, self.heads * self.width)
        scores = ACTIVATIONS[self.case["gate_activation"]](logits).view(B, T, self.heads, self.width)
        if self.case["gate_sharing"] == "shared":
            scores = scores.mean(2, keepdim=True)
        self.scores = scores.detach()
        y_heads = y.view(B, T, self.heads, -1)
        gated = y_heads + scores if self.case["gate_form"] == "additive" else y_heads * scores
        return gated.reshape(y.shape)


def self_modulation(case, y):
    """Table 3 rows 5 and 6: RMSNorm or SiLU of each head's SDPA output, without parameters."""
    if case["gate_activation"] == "silu":
        return F.silu(y)
    heads = y.view(*y.shape[:2], case["n_heads"], case["head_dim"])
    return (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + case["norm_eps"])).reshape(y.shape)


def add_gate(attention, case):
    position = case["gate_position"]
    if position == "none":
        return
    if case["gate_form"] == "self":
        attention.o_proj.register_forward_pre_hook(lambda module, args: self_modulation(case, args[0]))
        return
    gate = attention.gate = Gate(case)
    if position in ("G2", "G3", "G4"):
        projection = {"G2": attention.v_proj, "G3": attention.k_proj, "G4": attention.q_proj}[position]
        projection.register_forward_hook(lambda module, args, y: gate(args[0], y))
        return
    hidden = {}
    attention.q_proj.register_forward_pre_hook(lambda module, args: hidden.update(x=args[0]))
    if position == "G1":
        attention.o_proj.register_forward_pre_hook(lambda module, args: gate(hidden["x"], args[0]))
    else:
        attention.o_proj.register_forward_hook(lambda module, args, y: gate(hidden["x"], y))


def attention_with_sink(module, query, key, value, mask, scaling, **_):
    """softmax over [scores | sink logit]; the sink's column carries no value. attention_sink = one: its logit is 0."""
    groups = module.num_key_value_groups
    scores = query @ repeat_kv(key, groups).transpose(2, 3) * scaling + mask[..., : key.shape[2]]
    sinks = module.sinks if module.sinks is not None else scores.new_zeros(scores.shape[1])
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    p = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return (p @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), p


ALL_ATTENTION_FUNCTIONS["sink"] = attention_with_sink


class Switch(nn.Module):
    """A projection of E experts for each head: the K with the highest sigmoid(x W_router), weighted by it, are added up."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.weight = nn.Parameter(torch.zeros(case["n_kv_heads"] * case["switch_experts"], case["d_model"]))

    def forward(self, x, experts):
        shape = (*x.shape[:2], self.case["n_kv_heads"], self.case["switch_experts"])
        scores = torch.sigmoid(F.linear(x, self.weight)).view(shape)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(self.case["switch_top_k"]).indices, 1.0)
        return ((scores * chosen).unsqueeze(-1) * experts.view(*shape, -1)).sum(3).flatten(2)


def add_switch(attention, case, letter):
    rows = case["n_kv_heads"] * case["switch_experts"] * case["head_dim"]
    projection = nn.Linear(case["d_model"], rows, bias=False)
    switch = Switch(case)
    setattr(attention, f"{letter}_proj", projection)
    setattr(attention, f"{letter}_router", switch)
    projection.register_forward_hook(lambda module, args, y: switch(args[0], y))


def add_output_stage(module, clip, norm):
    """What follows the attention block's or the FFN's output: A.6's clamp, then the sandwich norm."""

    def clamp(module, args, y):
        module.before_clip = y.detach()
        return y.clamp(-clip, clip)

    if clip > 0:
        module.register_forward_hook(clamp)
    if norm is not None:
        module.register_forward_hook(lambda module, args, y: norm(y))


def ffn_output(layer):
    return getattr(layer.mlp, "down_proj", layer.mlp)  # a mixture gives its sum


def gated_model(case, **more):
    config = qwen3_config(case, **more)
    model = mixture_model(config, case) if "n_experts" in case else Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        attention = layer.self_attn
        if not case["qk_norm"]:
            attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        if case["sandwich_norm"]:
            layer.attn_out_norm = Qwen3RMSNorm(case["d_model"], case["norm_eps"])
            layer.ffn_out_norm = Qwen3RMSNorm(case["d_model"], case["norm_eps"])
        for letter in case.get("switch_heads", "none").removeprefix("none"):
            add_switch(attention, case, letter)
        add_gate(attention, case)
        if case.get("attention_sink", "none") != "none":
            attention.sinks = nn.Parameter(torch.zeros(case["n_heads"])) if case["attention_sink"] == "learned" else None
            model.config._attn_implementation = "sink"
        add_output_stage(attention.o_proj, case["attn_clip"], getattr(layer, "attn_out_norm", None))
        add_output_stage(ffn_output(layer), case["ffn_clip"], getattr(layer, "ffn_out_norm", None))
    return model.float().eval()


class PackedAttention(Qwen3Attention):
    """Per key-value group, q_proj's output is [the group's queries | the group's gate logits]."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate_width = 1 if config.headwise_attn_output_gate else self.head_dim
        rows = config.num_attention_heads * (self.head_dim + self.gate_width)
        self.q_proj = nn.Linear(config.hidden_size, rows, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        B, T, _ = hidden_states.shape
        groups, heads, D = self.config.num_key_value_heads, self.num_key_value_groups, self.head_dim
        packed = self.q_proj(hidden_states).view(B, T, groups, heads * (D + self.gate_width))
        query, logits = packed.split([heads * D, heads * self.gate_width], dim=-1)
        query = self.q_norm(query.reshape(B, T, groups * heads, D)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(B, T, groups, D)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(B, T, groups, D).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        y, weights = eager_attention_forward(self, query, key, value, attention_mask, scaling=self.scaling)
        y = y * torch.sigmoid(logits.reshape(B, T, groups * heads, self.gate_width))
        return self.o_proj(y.reshape(B, T, -1)), weights


def packed_model(config):
    model = Qwen3ForCausalLM(config)
    if config.headwise_attn_output_gate or config.elementwise_attn_output_gate:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn = PackedAttention(config, i)
    return model.float().eval()


def pack_gate(state, n_kv_heads):
    """A gated_model's state with each layer's gate rows moved into q_proj, group by group."""
    packed = dict(state)
    for name in [n for n in state if n.endswith("self_attn.gate.weight")]:
        query_name = name.replace(".gate.", ".q_proj.")
        parts = zip(state[query_name].chunk(n_kv_heads), packed.pop(name).chunk(n_kv_heads))
        packed[query_name] = torch.cat([rows for part in parts for rows in part])
    return packed
