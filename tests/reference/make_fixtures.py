"""Writes tests/fixtures/: what PyTorch computes for tiny models of every kind that the C code knows.

    .venv/bin/python tests/reference/make_fixtures.py            writes; the same bytes each time
    .venv/bin/python tests/reference/make_fixtures.py --check    recomputes and compares, writes nothing

README.md beside this file says what a fixture holds.
"""
import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from analysis_fixtures import analysis_of, interventions_of
from gated_qwen3 import ffn_output, gated_model, pack_gate, packed_model, qwen3_config
from mixture import router_losses, routing

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SEED = 1  # one for which no value lies where rounding would decide what is counted or clipped
CHECK_TOLERANCE = 1e-4  # rounding moves most tensors by less than 5e-6, but a scalar gate's gradient by some 1e-5
PACKING_TOLERANCE = 1e-6

# No two sizes agree and head_dim is not d_model / n_heads, so that a transposed or mistaken size cannot go unnoticed.
DEFAULTS = dict(
    vocab_size=37, d_model=18, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=22, max_seq_len=16,
    rope_base=10000.0, norm_eps=1e-6, qk_norm=1, tied_embeddings=0, sandwich_norm=0, attn_clip=0.0, ffn_clip=0.0,
    gate_position="none", gate_type="elementwise", gate_sharing="specific", gate_form="multiplicative",
    gate_activation="sigmoid", gate_input="query", gate_frozen=0, batch=2, seq_len=11,
)
QWEN_SIZES = dict(d_model=24, head_dim=8, d_ff=40)


def gate(position, **keys):
    return dict(gate_position=position, **{f"gate_{key}": value for key, value in keys.items()})


CASES = {
    "baseline": QWEN_SIZES,
    # Table 1 rows 5 to 9: positions
    "g1_elementwise": gate("G1") | QWEN_SIZES,
    "g2_elementwise": gate("G2"),
    "g3_elementwise": gate("G3"),
    "g4_elementwise": gate("G4"),
    "g5_elementwise": gate("G5"),
    # rows 10, 11: granularity; G3 and G4 without QK-norm, which would undo one factor for a whole head
    "g1_headwise": gate("G1", type="headwise") | QWEN_SIZES,
    "g2_headwise": gate("G2", type="headwise"),
    "g3_headwise": gate("G3", type="headwise") | dict(qk_norm=0),
    "g4_headwise": gate("G4", type="headwise") | dict(qk_norm=0),
    # rows 12, 13: sharing
    "g1_shared": gate("G1", sharing="shared"),
    "g2_shared": gate("G2", sharing="shared"),
    "g1_headwise_shared": gate("G1", type="headwise", sharing="shared"),
    "g4_shared": gate("G4", sharing="shared"),
    # rows 14, 15 and Table 3 row 7: form and activation
    "g1_additive_silu": gate("G1", form="additive", activation="silu"),
    "g1_additive_identity": gate("G1", form="additive", activation="identity"),
    "g2_additive_silu_headwise": gate("G2", type="headwise", form="additive", activation="silu"),
    "g1_silu": gate("G1", activation="silu"),
    # Table 3 rows 5, 6; the large norm_eps shows whether it is read
    "self_rmsnorm": gate("G1", form="self", activation="rmsnorm") | dict(norm_eps=1e-3),
    "self_silu": gate("G1", form="self", activation="silu"),
    # Table 4 rows 6, 7, and a scalar for each layer
    "g1_input_independent": gate("G1", input="none"),
    "g2_input_independent_headwise": gate("G2", type="headwise", input="none"),
    "g1_ns_sigmoid": gate("G1", activation="ns-sigmoid"),
    "g1_scalar": gate("G1", input="scalar"),
    "g5_scalar": gate("G5", input="scalar"),
    # a sink logit in each head's softmax: learned, and the constant 0
    "sink_learned": dict(attention_sink="learned"),
    "sink_learned_g1": gate("G1", type="headwise")
    | dict(attention_sink="learned", seq_len=70, max_seq_len=70, batch=1, n_heads=2, n_kv_heads=1),
    "sink_one": dict(attention_sink="one", n_kv_heads=1),
    # a gate that reads the first channels of the normed hidden states
    "channels_headwise": gate("G1", type="headwise", input_dims=7),
    "channels_value": gate("G2", input_dims=3),
    # switch heads, Table 6 in small: all experts chosen, two of five, one
    "switch_kv_3top3": dict(switch_heads="kv", switch_experts=3, switch_top_k=3),
    "switch_v_5top2": dict(switch_heads="v", switch_experts=5, switch_top_k=2),
    "switch_kv_4top1": gate("G1", type="headwise")
    | dict(switch_heads="kv", switch_experts=4, switch_top_k=1, qk_norm=0),
    "switch_v_1top1": dict(switch_heads="v", switch_experts=1, switch_top_k=1),
    # the rest of the block
    "no_qk_norm": gate("G1") | dict(qk_norm=0),
    "tied": gate("G1") | dict(tied_embeddings=1),
    "sandwich": dict(sandwich_norm=1),
    "clip": dict(attn_clip=0.6, ffn_clip=0.4),
    "g5_clip_sandwich_tied": gate("G5")
    | dict(attn_clip=0.3, ffn_clip=0.5, sandwich_norm=1, tied_embeddings=1, qk_norm=0, norm_eps=1e-3),
    # query heads per key-value head: 1 and n_heads (2 everywhere else)
    "gqa_1": gate("G2") | dict(n_kv_heads=4),
    "gqa_n": gate("G1", type="headwise") | dict(n_kv_heads=1),
    # lengths: one position; two and three attention tiles of 64
    "one_position": gate("G1") | dict(seq_len=1, max_seq_len=1),
    "rope_1e6": dict(rope_base=1e6, seq_len=70, max_seq_len=70, batch=1, n_heads=2, n_kv_heads=1),
    # 4.4: YaRN, with pairs on the ramp and on both sides of it; with a scale and bounds of its own
    "yarn": gate("G1", type="headwise")
    | dict(rope_factor=4.0, rope_original_length=64, max_seq_len=256, seq_len=70, batch=1, head_dim=16, n_heads=2)
    | dict(n_kv_heads=1, rope_base=100.0),
    "yarn_own_scale": dict(rope_factor=2.5, rope_original_length=16, max_seq_len=40, seq_len=20, rope_beta_fast=2.0)
    | dict(rope_beta_slow=0.25, rope_attention_factor=0.8, qk_norm=0, head_dim=10),
    "long": gate("G1") | dict(seq_len=132, max_seq_len=160, n_heads=2, n_kv_heads=1),
}
# Those whose details analysis_fixtures.py works out too: every position, form and sharing, and what follows W_O.
ANALYSED = (
    "baseline", "g1_elementwise", "g1_headwise", "g2_elementwise", "g3_headwise", "g4_shared", "g1_headwise_shared",
    "g1_additive_silu", "self_rmsnorm", "g2_input_independent_headwise", "g1_scalar", "g5_clip_sandwich_tied", "clip",
    "gqa_1", "no_qk_norm", "one_position", "long", "sink_learned_g1",
)
# A mixture of experts: each expert has rows, no choice is close.
MIXTURES = {
    "mixture": dict(n_experts=5, experts_per_token=2, n_layers=1, load_balance_coef=0.2, router_z_coef=0.05),
    "mixture_plain_weights": gate("G1") | dict(n_experts=6, experts_per_token=3, normalize_top_k=0),
    # three micro-batches of one sequence: the counts are those of the batch so far
    "mixture_global_batch": gate("G2", type="headwise") | dict(
        n_experts=4, experts_per_token=2, load_balance_coef=0.5, router_z_coef=0.1, batch=3, gradient_accumulation_steps=3,
        sandwich_norm=1, ffn_clip=0.5,
    ),
}
CASES |= {
    name: dict(normalize_top_k=1, load_balance_coef=0.1, router_z_coef=0.02, gradient_accumulation_steps=1, d_ff=10) | case
    for name, case in MIXTURES.items()
}
IGNORED_TARGETS = ("baseline", "tied", "long")

# Real checkpoint directories: configuration, storage type, shards, RoPE scaling.
CHECKPOINTS = {
    "hf_baseline": dict(case=QWEN_SIZES, dtype=torch.float16),
    "hf_headwise": dict(
        case=gate("G1", type="headwise") | QWEN_SIZES | dict(tied_embeddings=1, n_heads=6), dtype=torch.bfloat16
    ),
    "hf_elementwise": dict(case=gate("G1") | QWEN_SIZES, shard_bytes=36000),
    "hf_yarn": dict(
        case=gate("G1", type="headwise") | QWEN_SIZES | dict(max_seq_len=1024, seq_len=40, batch=1),
        rope_scaling=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0
        ),
    ),
}


def generator(name):
    """NumPy's, since its numbers do not depend on the processor."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def initial_weight(random, name, shape, case):
    """Scales that keep every activation near 1 and spread the attention and the gate scores."""
    x = random.standard_normal(shape)
    if len(shape) == 1:
        x = 1 + 0.3 * x
    elif name.endswith("router.weight"):
        x *= 0.5
    elif name.endswith("gate.weight"):
        x *= {"query": 0.5, "none": 1.5, "scalar": 1.0}[case["gate_input"]]
    elif "embed_tokens" in name:
        x *= 0.5
    else:
        x *= shape[1] ** -0.5
    return torch.from_numpy(x.astype(np.float32))


def initialise(model, random, case):
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(initial_weight(random, name, tuple(parameter.shape), case))


def round_parameters(model, dtype):
    """Not model.to(dtype).float(): that would round RoPE's frequencies too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def make_batch(random, case, ignore):
    stream = torch.from_numpy(random.integers(0, case["vocab_size"], (case["batch"], case["seq_len"] + 1)))
    tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    if ignore:
        targets[-1, case["seq_len"] // 2] = -1
    return tokens, targets


def mean_loss(logits, targets):
    """In nats, over the targets that are not -1."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def by_layer(values):
    return torch.stack([value.detach().float() for value in values])


def gate_statistics(model):
    gates = [getattr(layer.self_attn, "gate", None) for layer in model.model.layers]
    if gates[0] is None:
        return {}
    scores = [gate.scores.double() for gate in gates]
    for s in scores:
        for threshold in (0.1, 0.5):
            assert (s - threshold).abs().min() > 1e-6, "a score too near to a threshold: change SEED"
    return {
        "gate_mean_by_layer": by_layer(s.mean() for s in scores),
        "gate_std_by_layer": by_layer(s.std(correction=0) for s in scores),
        "gate_min_by_layer": by_layer(s.min() for s in scores),
        "gate_max_by_layer": by_layer(s.max() for s in scores),
        "gate_below_0.1_by_layer": by_layer((s < 0.1).double().mean() for s in scores),
        "gate_below_0.5_by_layer": by_layer((s < 0.5).double().mean() for s in scores),
    }


def evaluate(model, tokens, targets, case):
    """Forward and backward: returns logits, loss and metrics, and leaves the gradients in the parameters."""
    residuals = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: residuals.append(out[0].detach()))
        for layer in model.model.layers
    ]
    out = model(input_ids=tokens, output_attentions=True)
    for hook in hooks:
        hook.remove()
    loss = mean_loss(out.logits, targets)
    mixture = "n_experts" in case
    (loss + router_losses(model, case) if mixture else loss).backward()
    first = [a[..., 0] for a in out.attentions]  # (B, HQ, T) for each layer
    shares = [1 - a.double().sum(-1) for a in out.attentions]  # what a sink logit takes
    with_sink = model.config._attn_implementation == "sink"
    return {
        "logits": out.logits.detach(),
        "loss": loss.detach().view(1),
        "f_attn_by_layer": by_layer(f.mean() for f in first),
        "f_attn_by_head": by_layer(f.mean((0, 2)) for f in first),
        "max_act_by_layer": by_layer(r.abs().max() for r in residuals),
        "attention_layer0": out.attentions[0].detach(),
    } | gate_statistics(model) | ({"sink_share_by_layer": by_layer(s.mean() for s in shares)} if with_sink else {}) | (
        routing(model, case) if mixture else {}
    )


def verify(name, case, tensors):
    """What must hold whatever the numbers are, so that a fixture cannot be empty of meaning."""
    attention = tensors["attention_layer0"]
    if "attention_sink" in case:
        assert ((tensors["sink_share_by_layer"] > 0.05) & (tensors["sink_share_by_layer"] < 0.8)).all(), name
    else:
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5), name
    assert attention.triu(1).count_nonzero() == 0, name
    f_attn = tensors["f_attn_by_layer"]
    assert torch.allclose(tensors["f_attn_by_head"].mean(1), f_attn, atol=1e-6), name
    if case["seq_len"] == 1:
        assert (f_attn == 1).all(), name
    else:
        assert ((f_attn > 1 / case["seq_len"]) & (f_attn < 0.8)).all(), (name, f_attn)
    uniform = np.log(case["vocab_size"])
    assert 0.5 * uniform < tensors["loss"].item() < 4 * uniform, (name, tensors["loss"])
    for key, value in tensors.items():
        assert not value.is_floating_point() or value.isfinite().all(), (name, key)
        query_or_key = any(part in key for part in ("q_proj", "k_proj", "q_norm", "k_norm"))
        if key.startswith("grad.") and not (case["seq_len"] == 1 and query_or_key):
            assert value.abs().max() > 1e-5, (name, key)
    if "gate_min_by_layer" in tensors and case["gate_input"] == "query":
        assert (tensors["gate_std_by_layer"] > 0.05).all(), name


def verify_clipping(name, case, model):
    """Some outputs are clipped and some are not, and none is so near to the limit that rounding decides."""
    for layer in model.model.layers:
        for module, clip in ((layer.self_attn.o_proj, case["attn_clip"]), (ffn_output(layer), case["ffn_clip"])):
            if clip > 0:
                size = module.before_clip.abs()
                assert 0.02 < (size > clip).float().mean() < 0.9, (name, clip)
                assert (size - clip).abs().min() > 1e-5, (name, "a value too near to the limit: change SEED")


def metadata(case):
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in case.items()}


def write_safetensors(path, tensors, meta):
    """The library orders the tensors but not the metadata; sorted metadata makes the bytes reproducible."""
    blob = save({name: tensor.contiguous() for name, tensor in tensors.items()}, meta)
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"] = dict(sorted(meta.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + length :])


def make_case(name, directory):
    case = DEFAULTS | CASES[name]
    random = generator(name)
    model = gated_model(case)
    initialise(model, random, case)
    tokens, targets = make_batch(random, case, name in IGNORED_TARGETS)
    tensors = {"tokens": tokens.int(), "targets": targets.int()} | evaluate(model, tokens, targets, case)
    for key, parameter in model.named_parameters():
        tensors[f"weight.{key}"] = parameter.detach()
        tensors[f"grad.{key}"] = parameter.grad
    verify(name, case, tensors)
    verify_clipping(name, case, model)
    write_safetensors(directory / f"{name}.safetensors", tensors, metadata(case))
    if name in ANALYSED:
        figures = analysis_of(model, case, tokens)
        figures |= interventions_of(model, case, tokens, lambda logits: mean_loss(logits, targets))
        write_safetensors(directory / "analysis" / f"{name}.safetensors", figures, metadata(case))


def checkpoint_model(directory):
    """The model of a checkpoint directory, in float32, read file by file."""
    config = Qwen3Config.from_pretrained(directory, attn_implementation="eager", use_cache=False)
    state = {}
    for path in sorted(directory.glob("model*.safetensors")):
        state |= load_file(path)
    model = packed_model(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else []), missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def make_checkpoint(name, directory):
    """A Hugging Face directory with the gate packed in q_proj; expected.safetensors is from the unpacked model."""
    recipe = CHECKPOINTS[name]
    case = DEFAULTS | recipe["case"]
    dtype = recipe.get("dtype", torch.float32)
    gated = case["gate_position"] == "G1"
    switches = dict(
        use_qk_norm=True,
        qkv_bias=False,
        headwise_attn_output_gate=gated and case["gate_type"] == "headwise",
        elementwise_attn_output_gate=gated and case["gate_type"] == "elementwise",
    )
    rope = dict(rope_scaling=recipe.get("rope_scaling"))

    random = generator(name)
    model = gated_model(case, **rope)
    initialise(model, random, case)
    round_parameters(model, dtype)
    tokens, targets = make_batch(random, case, ignore=False)
    expected = {"tokens": tokens.int(), "targets": targets.int()} | evaluate(model, tokens, targets, case)

    packed = packed_model(qwen3_config(case, **switches, **rope))
    packed.load_state_dict(pack_gate(model.state_dict(), case["n_kv_heads"]))
    with torch.no_grad():
        packed_logits = packed(input_ids=tokens).logits
    difference = (packed_logits - expected["logits"]).abs().max().item()
    assert difference <= PACKING_TOLERANCE * expected["logits"].abs().max().item(), (name, difference)

    target = directory / name
    packed.to(dtype).save_pretrained(target, max_shard_size=recipe.get("shard_bytes", "1GB"))
    (target / "generation_config.json").unlink()
    write_safetensors(target / "expected.safetensors", expected, metadata(case))

    with torch.no_grad():
        read_back = checkpoint_model(target)(input_ids=tokens).logits
        assert torch.equal(read_back, packed_logits), name
        if not gated:
            stock = Qwen3ForCausalLM.from_pretrained(target, attn_implementation="eager")
            assert torch.equal(stock(input_ids=tokens).logits, read_back), name


def make_all(directory):
    (directory / "analysis").mkdir(parents=True, exist_ok=True)
    for name in CASES:
        make_case(name, directory)
    for name in CHECKPOINTS:
        make_checkpoint(name, directory)


def read(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def tensor_difference(a, b):
    """Relative to the tensor's norm (a constant gate's deviation is zero up to rounding); infinite where type, shape or
    an integer differs."""
    if a.dtype != b.dtype or a.shape != b.shape or not (a.is_floating_point() or torch.equal(a, b)):
        return float("inf")
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-9)).item()


def compare_file(stored, made):
    """Yields one line for each difference."""
    if made.suffix == ".json":
        if json.loads(stored.read_text()) != json.loads(made.read_text()):
            yield "differs"
        return
    (stored_meta, stored_tensors), (made_meta, made_tensors) = read(stored), read(made)
    if stored_meta != made_meta:
        yield "metadata differs"
    for name in sorted(stored_tensors.keys() ^ made_tensors.keys()):
        yield f"{name} is on one side only"
    for name in sorted(stored_tensors.keys() & made_tensors.keys()):
        difference = tensor_difference(stored_tensors[name], made_tensors[name])
        if not difference <= CHECK_TOLERANCE:
            yield f"{name} differs by {difference:.2e}"


def files_under(directory):
    return {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}


def check(stored):
    """Recomputes everything aside; returns the lines that say what differs."""
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        make_all(made)
        expected = files_under(made)
        folders = {path.parent for path in expected}  # other scripts have folders of their own
        there = {path for path in files_under(stored) if path.parent in folders}
        lines = [f"{path}: missing" for path in sorted(expected - there)]
        others = [path for path in there - expected if not path.parts[0].startswith("outside_")]
        lines += [f"{path}: not made here" for path in sorted(others)]
        for path in sorted(there & expected):
            lines += [f"{path}: {line}" for line in compare_file(stored / path, made / path)]
        return lines


def main():
    parser = argparse.ArgumentParser(description="Writes the PyTorch fixtures of the tests.")
    parser.add_argument("--check", action="store_true", help="recompute and compare with what is stored; write nothing")
    parser.add_argument("--output", type=Path, default=FIXTURES, help="default: %(default)s")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not arguments.check:
        make_all(arguments.output)
    lines = check(arguments.output) if arguments.check else []
    for line in lines:
        print(line, file=sys.stderr)
    files = files_under(arguments.output)
    size = sum((arguments.output / path).stat().st_size for path in files)
    state = f"{len(lines)} differences" if lines else "agree" if arguments.check else "written"
    print(f"{arguments.output}: {len(files)} files, {size / 1e6:.2f} MB, {state}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
