"""Memory of analysing a model that is larger in float32 than memory need be: 1.84 G random parameters in BF16.

    .venv/bin/python tests/bench/mapped.py [SEQ_LEN [DIRECTORY]]     SEQ_LEN 4096; 3.7 GB below DIRECTORY (/tmp), removed

Writes a gated Qwen3 of the size of the paper's 1.7B models (28 layers) in two shards, lets `./analyze` measure one window
of it, and prints the peak of its resident memory, mapped pages of the checkpoint included.
"""
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

C, L, HQ, HK, D, F, V = 2048, 28, 16, 8, 128, 6144, 151936
LAYER = {
    "input_layernorm": (C,), "self_attn.q_proj": (2 * HQ * D, C), "self_attn.k_proj": (HK * D, C),
    "self_attn.v_proj": (HK * D, C), "self_attn.o_proj": (C, HQ * D), "self_attn.q_norm": (D,), "self_attn.k_norm": (D,),
    "post_attention_layernorm": (C,), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
}
CONFIG = dict(
    model_type="qwen3", vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=L, num_attention_heads=HQ,
    num_key_value_heads=HK, head_dim=D, max_position_embeddings=32768, tie_word_embeddings=True, use_qk_norm=True,
    qkv_bias=False, elementwise_attn_output_gate=True,
)


def tensors():
    yield "model.embed_tokens.weight", (V, C)
    for layer in range(L):
        for name, shape in LAYER.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (C,)


def bfloat16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


def write_shard(path, shard, random):
    header, end = {}, 0
    for name, shape in shard:
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shard:
            size = 2 * int(np.prod(shape))
            piece = bfloat16(np.ones(shape) if len(shape) == 1 else 0.02 * random.standard_normal(1 << 20))
            for begin in range(0, size, len(piece)):
                file.write(piece[: size - begin])


def write_checkpoint(directory):
    every, random, index = list(tensors()), np.random.default_rng(0), {}
    half = len(every) // 2
    for number, shard in enumerate((every[:half], every[half:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        write_shard(directory / name, shard, random)
        index |= {tensor: name for tensor, _ in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def main():
    seq_len = sys.argv[1] if len(sys.argv) > 1 else "4096"
    directory = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else None))
    try:
        write_checkpoint(directory)
        subprocess.run(["./analyze", "--describe", directory], check=True)
        start = time.time()
        subprocess.run(["./analyze", "--models", f"random:{directory}", "--data", f"gen:random,vocab={V}", "--num_samples",
                        "1", "--seq_len", seq_len, "--output", directory / "report"], check=True, stdout=subprocess.DEVNULL)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"a window of {seq_len} tokens: {time.time() - start:.0f} s, peak of resident memory {peak / 1e9:.2f} GB")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
