"""Checkpoints in both directions: PyTorch writes, the C code reads, computes and writes, PyTorch reads again.

    .venv/bin/python tests/reference/round_trip.py PROGRAM [--authors DIR]

PROGRAM is tests/reference/logits.c compiled. For each kind of model: the logits of the two agree within 1e-4 on what
PyTorch wrote, PyTorch has them again from what the C code wrote, and the C code once more from what PyTorch makes of
that. With --authors the gated models are computed by the modelling code of the paper's authors (modeling_qwen3.py and
configuration_qwen3.py in DIR) in place of this project's reading of it. Prints a line for each kind.
"""
import argparse
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers

from gated_qwen3 import packed_model
from make_outside import initial_weight

T = 19
TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=53, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    intermediate_size=40, max_position_embeddings=32, rope_theta=1e4, use_cache=False, tie_word_embeddings=False,
)
GATES = dict(use_qk_norm=True, qkv_bias=False, headwise_attn_output_gate=False, elementwise_attn_output_gate=False)
HEADWISE, ELEMENTWISE = dict(headwise_attn_output_gate=True), dict(elementwise_attn_output_gate=True)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
YARN = dict(rope_scaling=dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=32.0, beta_slow=1.0
))

# Kind: model class, the keys that differ, how PyTorch stores it, bytes of a shard.
KINDS = {
    "baseline": ("gated", {}, torch.float32, "1GB"),
    "headwise": ("gated", HEADWISE, torch.float32, "1GB"),
    "elementwise": ("gated", ELEMENTWISE, torch.float32, "1GB"),
    "headwise, tied": ("gated", HEADWISE | dict(tie_word_embeddings=True), torch.float32, "1GB"),
    "elementwise, 1 head a group": ("gated", ELEMENTWISE | dict(num_key_value_heads=6), torch.float32, "1GB"),
    "elementwise, 1 group": ("gated", ELEMENTWISE | dict(num_key_value_heads=1), torch.float32, "1GB"),
    "headwise, BF16, shards": ("gated", HEADWISE, torch.bfloat16, "8KB"),
    "elementwise, F16": ("gated", ELEMENTWISE, torch.float16, "1GB"),
    "elementwise, YaRN": ("gated", ELEMENTWISE | YARN, torch.float32, "1GB"),
    "Qwen3": ("Qwen3", {}, torch.bfloat16, "1GB"),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS | dict(norm_topk_prob=True), torch.float32, "1GB"),
    "Qwen3-MoE, BF16, shards": ("Qwen3Moe", EXPERTS, torch.bfloat16, "16KB"),
    "Qwen3, YaRN with a scale of its own": (
        "Qwen3", dict(rope_scaling=YARN["rope_scaling"] | dict(attention_factor=1.3)), torch.float32, "1GB"
    ),
    "Llama": ("Llama", dict(rms_norm_eps=1e-5), torch.float32, "1GB"),
    "Llama, tied, F16": ("Llama", dict(tie_word_embeddings=True, rope_theta=5e5), torch.float16, "1GB"),
}


class Stock:
    """A class of transformers itself."""

    def __init__(self, name):
        self.config_class = getattr(transformers, f"{name}Config")
        self.model_class = getattr(transformers, f"{name}ForCausalLM")

    def make(self, keys):
        return self.model_class(self.config_class(**SIZES | keys, attn_implementation="eager")).float().eval()

    def read(self, directory):
        return self.model_class.from_pretrained(directory, attn_implementation="eager").float().eval()


class Gated(Stock):
    """Qwen3 with this project's reading of the widened q_proj."""

    def __init__(self):
        super().__init__("Qwen3")

    def make(self, keys):
        return packed_model(self.config_class(**SIZES | GATES | keys, attn_implementation="eager"))

    def read(self, directory):
        config = self.config_class.from_pretrained(directory, attn_implementation="eager")
        model, state = packed_model(config), {}
        for path in sorted(Path(directory).glob("model*.safetensors")):
            state |= transformers.modeling_utils.load_state_dict(str(path))
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert missing == (["lm_head.weight"] if config.tie_word_embeddings else []) and not unexpected
        model.tie_weights()
        return model.float()


class Authors(Stock):
    """Qwen3 by the authors' own modelling code."""

    def __init__(self, directory):
        package = Path(directory).resolve()
        sys.path.insert(0, str(package.parent))
        module = __import__(f"{package.name}.modeling_qwen3", fromlist=["Qwen3ForCausalLM"])
        self.model_class = module.Qwen3ForCausalLM
        self.config_class = module.Qwen3Config

    def make(self, keys):
        return super().make(GATES | keys)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None].long()).logits[0].float().numpy()


def c_logits(program, directory, tokens, work, written=None):
    tokens.astype("<i4").tofile(work / "tokens")
    command = [program, directory, work / "tokens", work / "logits"] + ([written] if written else [])
    subprocess.run(command, check=True)
    return np.fromfile(work / "logits", "<f4").reshape(len(tokens), -1)


def check(program, builder, keys, dtype, shard_bytes, work, seed):
    """The largest difference of logits: of what PyTorch wrote, of what C wrote from it, of what PyTorch wrote from that."""
    torch.manual_seed(0)
    model = builder.make(keys)
    random = np.random.default_rng([2, seed])
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(initial_weight(random, name, parameter).to(dtype))
    tokens = random.integers(0, SIZES["vocab_size"], T)
    expected = logits_of(model, tokens)
    model.to(dtype).save_pretrained(work / "theirs", max_shard_size=shard_bytes)
    ours = c_logits(program, work / "theirs", tokens, work, work / "ours")
    again = builder.read(work / "ours")
    back = logits_of(again, tokens)
    again.save_pretrained(work / "once_more")
    last = c_logits(program, work / "once_more", tokens, work)
    return [float(abs(x - expected).max()) if np.isfinite(x).all() else np.inf for x in (ours, back, last)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--authors", help="directory with modeling_qwen3.py and configuration_qwen3.py")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    failed = 0
    for kind, (name, keys, dtype, shard_bytes) in KINDS.items():
        gated = Authors(arguments.authors) if arguments.authors else Gated()
        builder = gated if name == "gated" else Stock(name)
        with tempfile.TemporaryDirectory() as work:
            seed = zlib.crc32(kind.encode())
            try:
                differences = check(arguments.program.resolve(), builder, keys, dtype, shard_bytes, Path(work), seed)
            except subprocess.CalledProcessError:
                differences = [np.inf]
        good = all(d <= TOLERANCE for d in differences)
        failed += not good
        print("ok  " if good else "FAIL", f"{kind}:", "there and back, largest difference of logits",
              " ".join(f"{d:.1e}" for d in differences))
    print(f"{len(KINDS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
