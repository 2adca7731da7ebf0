"""Writes tests/fixtures/outside_*/: models that transformers itself builds and saves, with the logits it computes.

    .venv/bin/python tests/reference/make_outside.py            writes
    .venv/bin/python tests/reference/make_outside.py --check    recomputes and compares, writes nothing

Qwen3-Next came with transformers 4.57, which is newer than the version in requirements.txt; beside that one it needs

    .venv/bin/pip install --no-deps --target build/newer transformers==4.57.1 huggingface_hub==0.36.0 tokenizers==0.22.1
    PYTHONPATH=build/newer .venv/bin/python tests/reference/make_outside.py

which makes that model alone.
"""
import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
B, T = 2, 11
SIZES = dict(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=16, use_cache=False, attn_implementation="eager",
)

# Directory: configuration, model, its keys, how it is stored. A model of Qwen3-Next's attention layers only, without experts.
MODELS = {
    "outside_llama": ("LlamaConfig", "LlamaForCausalLM", dict(rope_theta=5e5, rms_norm_eps=1e-5), torch.bfloat16),
    "outside_mistral": (
        "MistralConfig", "MistralForCausalLM", dict(sliding_window=None, num_key_value_heads=1, head_dim=10), torch.float16
    ),
    "outside_qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=8, tie_word_embeddings=True), torch.bfloat16),
    "outside_qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        dict(head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=10, norm_topk_prob=True),
        torch.float32,
    ),
    "outside_qwen3_next": (
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        dict(head_dim=16, partial_rotary_factor=0.25, num_experts=0, layer_types=["full_attention"] * 2), torch.float32,
    ),
}


def initial_weight(random, name, parameter):
    """Near what the parameter is without it where it is a norm's; else so that activations stay near 1."""
    x = random.standard_normal(tuple(parameter.shape)).astype(np.float32)
    if parameter.dim() == 1:
        return parameter + 0.3 * torch.from_numpy(x)
    return torch.from_numpy(x) * (0.5 if "embed_tokens" in name else parameter.shape[1] ** -0.5)


def make(name, directory):
    config_class, model_class, keys, dtype = MODELS[name]
    config = getattr(transformers, config_class)(**SIZES | keys)
    model = getattr(transformers, model_class)(config).float().eval()
    random = np.random.default_rng([1, zlib.crc32(name.encode())])
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            parameter.copy_(initial_weight(random, key, parameter).to(dtype))
        tokens = torch.from_numpy(random.integers(0, config.vocab_size, (B, T)))
        logits = model(input_ids=tokens).logits
    target = directory / name
    model.to(dtype).save_pretrained(target)
    (target / "generation_config.json").unlink()
    save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, target / "expected.safetensors")


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def differences(stored, made):
    """One line for each file of `made` that `stored` does not agree with."""
    for path in sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file()):
        if not (stored / path).exists():
            yield f"{path}: missing"
        elif path.suffix == ".json":
            old, new = (json.loads((d / path).read_text()) for d in (stored, made))
            if old != new:
                yield f"{path}: differs"
        else:
            old, new = read(stored / path), read(made / path)
            if old.keys() != new.keys() or any(not torch.allclose(old[k], new[k], rtol=0, atol=1e-5) for k in old):
                yield f"{path}: differs"


def main():
    parser = argparse.ArgumentParser(description="Writes fixtures of models that transformers builds.")
    parser.add_argument("--check", action="store_true", help="recompute and compare; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    newer = hasattr(transformers, "Qwen3NextForCausalLM")
    chosen = [name for name in MODELS if (name == "outside_qwen3_next") == newer]
    for name in MODELS.keys() - set(chosen):
        print(f"{name}: left as it is, it is made by another version than transformers {transformers.__version__}")
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            make(name, Path(temporary) if arguments.check else FIXTURES)
        if arguments.check:
            lines = list(differences(FIXTURES, Path(temporary)))
    print(*lines, f"{', '.join(chosen)}: {'checked' if arguments.check else 'written'}", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
