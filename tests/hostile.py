"""Attacks by file: each must end in its own clear line, exit code 1, within 10 s and 200 MB. For tests/test_hostile.sh.

    python3 tests/hostile.py ANALYZE TRAIN DIRECTORY [--table]      `ok NAME` or `FAIL NAME: why`; --table: attack | line

A small checkpoint of Qwen3's form is made in DIRECTORY and spoiled in one place for each attack.
"""

import json
import os
import pathlib
import random
import re
import resource
import struct
import subprocess
import sys
import time

C, F, V, D, L = 8, 12, 300, 4, 2
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": V, "hidden_size": C,
    "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "attention_bias": False, "hidden_act": "silu", "headwise_attn_output_gate": True,
}  # fmt: skip
SECONDS, MEGABYTES = 10, 200
TERABYTE = 1 << 40


def tensors():
    out = {"model.embed_tokens.weight": [V, C], "model.norm.weight": [C]}
    for i in range(L):
        layer = f"model.layers.{i}."
        out |= {f"{layer}{norm}.weight": [C] for norm in ("input_layernorm", "post_attention_layernorm")}
        out |= {f"{layer}self_attn.{norm}.weight": [D] for norm in ("q_norm", "k_norm")}
        out |= {f"{layer}self_attn.q_proj.weight": [2 * D + 2, C], f"{layer}self_attn.o_proj.weight": [C, 2 * D]}
        out |= {f"{layer}self_attn.{name}_proj.weight": [D, C] for name in "kv"}
        out |= {f"{layer}mlp.{name}_proj.weight": [F, C] for name in ("gate", "up")}
        out |= {f"{layer}mlp.down_proj.weight": [C, F]}
    return out


def entries(shapes):
    out, at = {}, 0
    for name, shape in shapes.items():
        n = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        out[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    return out, at


def values(n):
    draw = random.Random(1)
    return b"".join(struct.pack("<f", draw.gauss(0, 0.1)) for _ in range(n // 4))


def safetensors(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class Model:
    """A checkpoint before it is written."""

    def __init__(self, directory):
        self.directory = directory
        self.config = dict(CONFIG)
        self.header, size = entries(tensors())
        self.data = values(size)
        self.files = {}  # name -> bytes, or a function of the path; overrides what is above

    def entry(self, name):
        return self.header[name]

    def write(self):
        self.directory.mkdir(parents=True)
        files = {"config.json": json.dumps(self.config).encode(), "model.safetensors": None} | self.files
        for name, content in files.items():
            if content is None:
                content = safetensors(self.header, self.data)
            path = self.directory / name
            content(path) if callable(content) else path.write_bytes(content)
        if self.files.get("model.safetensors") == b"":
            (self.directory / "model.safetensors").unlink()


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def change(name, **fields):
    return lambda m: m.header[name].update(fields)


def offsets(name, begin, end):
    def spoil(m):
        old = m.header[name]["data_offsets"]
        m.header[name]["data_offsets"] = [begin(*old), end(*old)]

    return spoil


def header(text, data=b""):
    return lambda m: m.files.update({"model.safetensors": safetensors(text, data)})


def raw_header(old, new):
    """One place of the header's text."""

    def spoil(m):
        text = json.dumps(m.header).encode()
        assert text.count(old) >= 1, old
        m.files["model.safetensors"] = safetensors(text.replace(old, new, 1), m.data)

    return spoil


def length(n):
    return lambda m: m.files.update({"model.safetensors": safetensors(m.header, m.data, n)})


def put(name, content):
    return lambda m: m.files.update({name: content})


def config(**keys):
    return lambda m: m.config.update(keys)


def config_text(text):
    return put("config.json", text)


def index(weight_map, shards=True):
    """An index in place of the one file, with a right shard beside it."""

    def spoil(m):
        shard = "model-00001-of-00001.safetensors"
        names = {name: shard for name in m.header}
        m.files["model.safetensors"] = b""
        m.files[shard] = safetensors(m.header, m.data)
        text = weight_map(names) if callable(weight_map) else weight_map
        m.files["model.safetensors.index.json"] = text if isinstance(text, bytes) else json.dumps({"weight_map": text}).encode()

    return spoil


def sparse(size):
    def make(path):
        with open(path, "wb") as f:
            f.truncate(size)

    return make


def everywhere(target):
    return lambda names: {name: target for name in names}


def nan_weights(m):
    begin, end = m.header[QUERY]["data_offsets"]
    m.data = m.data[:begin] + struct.pack("<f", float("nan")) * ((end - begin) // 4) + m.data[end:]


def drop(name):
    """The tensor is not there; the others close up."""

    def spoil(m):
        shapes = tensors()
        shapes = {n: s for n, s in shapes.items() if n != name}
        m.header, size = entries(shapes)
        m.data = values(size)

    return spoil


def more(name, shape):
    def spoil(m):
        m.header, size = entries(tensors() | {name: shape})
        m.data = values(size)

    return spoil


def tokenizer(text):
    return put("tokenizer.json", text)


def vocabulary(extra="", model="", rest=""):
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in visible] + [chr(0x100 + i) for i in range(256 - len(visible))]
    vocab = json.dumps({c: i for i, c in enumerate(letters)})[:-1] + extra + "}"
    steps = '"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},"decoder":{"type":"ByteLevel"}'
    return f'{{{steps}{rest},"model":{{"type":"BPE"{model},"vocab":{vocab},"merges":[]}}}}'.encode()


# name, spoil(model), what the line must say
ATTACKS = [
    ("a header of 2^63 bytes", length(1 << 63), "which is too long"),
    ("a header longer than the file", length(1 << 20), "which is too long"),
    ("a header of 0 bytes", length(0), "no valid JSON at byte 0"),
    ("a file of 5 bytes", put("model.safetensors", b"abcde"), "too short for a safetensors file"),
    ("an empty file", put("model.safetensors", lambda path: path.write_bytes(b"")), "too short for a safetensors file"),
    ("a header of 1 TB, sparse", put("model.safetensors", lambda p: sparse(TERABYTE)(p) or os.pwrite(os.open(p, os.O_WRONLY), struct.pack("<Q", TERABYTE - 8), 0)), "which is too long"),
    ("a header of 90 MB of spaces", put("model.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 90 << 20) + b" " * (90 << 20))), "no valid JSON"),
    ("overlapping offsets", offsets(NORM, lambda a, b: a - 4, lambda a, b: b - 4), "overlaps another tensor"),
    ("a hole", offsets(NORM, lambda a, b: a + 4, lambda a, b: b + 4), "there is a hole before it|overlaps another tensor"),
    ("offsets out of order", offsets(NORM, lambda a, b: b, lambda a, b: a), "out of order"),
    ("negative offsets", offsets(NORM, lambda a, b: -4, lambda a, b: b), "data_offsets are not usable"),
    ("offsets beyond the file", offsets(NORM, lambda a, b: a + (1 << 40), lambda a, b: b + (1 << 40)), "beyond the end of the file"),
    ("offsets of 2^64", offsets(NORM, lambda a, b: a, lambda a, b: 1 << 64), "data_offsets are not usable"),
    ("offsets that are no integers", change(NORM, data_offsets=[0.5, 1e3]), "data_offsets are not usable"),
    ("three offsets", change(NORM, data_offsets=[0, 4, 8]), "data_offsets are not usable"),
    ("a tensor twice", raw_header(b'"model.norm.weight":', b'"model.norm.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "model.norm.weight":'), "stands twice"),
    ("a tensor without a dtype", lambda m: m.header[NORM].pop("dtype"), "has no dtype"),
    ("a dtype twice", raw_header(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"'), "dtype stands twice"),
    ("a dtype I8", change(NORM, dtype="I8"), "none of F32, BF16, F16, F64"),
    ("a dtype that is a number", change(NORM, dtype=3), "dtype is no string"),
    ("bytes of another dtype", change(NORM, dtype="BF16"), "shape and data_offsets differ in length"),
    ("a shape of 10^9", change(NORM, shape=[10**9]), "shape and data_offsets differ in length"),
    ("a shape whose product overflows", change(NORM, shape=[1 << 33, 1 << 33]), "shape is not usable"),
    ("a shape of 100 dimensions", change(NORM, shape=[1] * 100), "shape is not usable"),
    ("a shape of 10^6 dimensions", change(NORM, shape=[1] * 10**6), "shape is not usable"),
    ("a negative shape", change(NORM, shape=[-8]), "shape is not usable"),
    ("a shape that is a text", change(NORM, shape="8"), "shape is not usable"),
    ("another shape", change(NORM, shape=[2, 4]), r"shape \[2,4\]|\[2,4\]"),
    ("bytes behind the last tensor", lambda m: setattr(m, "data", m.data + b"more"), "bytes follow the last tensor"),
    ("data cut short", lambda m: setattr(m, "data", m.data[:-4]), "beyond the end of the file"),
    ("JSON 100000 deep", header(b"[" * 100000 + b"]" * 100000), "no valid JSON"),
    ("JSON that ends early", header(b'{"a": {"dtype": "F32"'), "no valid JSON"),
    ("a header that is an array", header(b"[1]"), "holds no JSON object"),
    ("a million tensors", lambda m: header(json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(500000)}).encode())(m), "is missing"),
    ("a name of 10 MB", raw_header(b"model.norm.weight", b"x" * (10 << 20)), "is missing"),
    ("a name with a line break", raw_header(b"model.norm.weight", b"model\\nnorm"), "is missing"),
    ("UTF-8 that is cut, in a name", raw_header(b"model.norm.weight", b"model\xe4\xbd"), "is missing"),
    ("a name with \\u0000", raw_header(b"model.norm.weight", b"model.norm.weight\\u0000x"), "no valid JSON"),
    ("metadata that is no object", raw_header(b"{", b'{"__metadata__": 3, '), "__metadata__ is no object"),
    ("a missing tensor", drop(QUERY), "q_proj.weight: is missing"),
    ("a tensor that nothing reads", more("model.layers.9.mlp.up_proj.weight", [4, 4]), "layers.9.mlp.up_proj"),
    ("a bias", more("model.layers.0.self_attn.q_proj.bias", [10]), "bias"),
    ("a gate that is not stored", lambda m: m.header[QUERY].update(shape=[10, 8]) or m.config.update(headwise_attn_output_gate=False), r"q_proj.weight"),
    ("an index to ../../etc/passwd", index(everywhere("../../etc/passwd")), "no plain file name"),
    ("an index to /etc/passwd", index(everywhere("/etc/passwd")), "no plain file name"),
    ("an index to a hidden file", index(everywhere(".hidden")), "no plain file name"),
    ("an index to an empty name", index(everywhere("")), "no plain file name"),
    ("an index to a number", index(lambda names: {name: 3 for name in names}), "is no string"),
    ("an index to a file that is not there", index(everywhere("none.safetensors")), "cannot open"),
    ("an index to itself", index(everywhere("model.safetensors.index.json")), "which is too long|no valid JSON"),
    ("an index that names a tensor of no shard", index(lambda names: names | {"x": "model-00001-of-00001.safetensors"}), "is not in this shard"),
    ("an index that leaves one out", index(lambda names: {n: s for n, s in names.items() if n != NORM}), "is not in the index"),
    ("an index with a tensor twice", index(lambda names: json.dumps({"weight_map": names}).replace("{", "{", 1).replace('"weight_map": {', '"weight_map": {"' + NORM + '": "model-00001-of-00001.safetensors", ').encode()), "stands twice"),
    ("an index without a map", index(b'{"metadata": {}}'), "has no weight_map"),
    ("an empty index", index({}), "weight_map is empty"),
    ("an index of 100000 shards", index(lambda names: {f"t{i}": f"s{i}.safetensors" for i in range(100000)}), "cannot open"),
    ("a shard that is a directory", lambda m: (index(everywhere("shard"))(m), m.files.update({"shard": lambda p: p.mkdir()})), "is not a regular file"),
    ("a link to /dev/zero", put("model.safetensors", lambda p: p.symlink_to("/dev/zero")), "is not a regular file"),
    ("a link to itself", put("model.safetensors", lambda p: p.symlink_to(p.name)), "[Tt]oo many levels|cannot open"),
    ("a FIFO", put("model.safetensors", lambda p: os.mkfifo(p)), "is not a regular file"),
    ("a directory in place of the weights", put("model.safetensors", lambda p: p.mkdir()), "is not a regular file"),
    ("NaN weights", nan_weights, "not finite|NaN|diverged"),
    ("config.json that is a FIFO", config_text(lambda p: os.mkfifo(p)), "is not a regular file"),
    ("config.json of 1 TB, sparse", config_text(sparse(TERABYTE)), "is larger than"),
    ("config.json 100000 deep", config_text(b'{"a":' * 100000 + b"1" + b"}" * 100000), "no valid JSON"),
    ("a vocabulary of 2^60", config(vocab_size=1 << 60), "vocab_size"),
    ("10^9 layers", config(num_hidden_layers=10**9), "num_hidden_layers|n_layers"),
    ("a hidden size of -8", config(hidden_size=-8), "hidden_size|d_model"),
    ("a hidden size of 0", config(hidden_size=0), "hidden_size|d_model"),
    ("no hidden size", lambda m: m.config.pop("hidden_size"), "hidden_size"),
    ("a hidden size that is a text", config(hidden_size="8"), "hidden_size"),
    ("1024 layers of 65536", config(num_hidden_layers=1024, hidden_size=65536, intermediate_size=1048576), "is missing|memory|shape"),
    ("both gates", config(elementwise_attn_output_gate=True), "gate"),
    ("heads that do not divide", config(num_attention_heads=3, num_key_value_heads=2), "n_kv_heads|num_key_value_heads|head"),
    ("an unknown model", config(model_type="mamba"), "mamba"),
    ("a key twice", config_text(json.dumps(CONFIG).replace("{", '{"vocab_size": 3, ', 1).encode()), "stands twice"),
    ("a NaN in the configuration", config(rms_norm_eps=float("nan")), "no valid JSON"),
    ("RoPE with base 0", config(rope_theta=0), "rope"),
    ("a tokenizer 100000 deep", tokenizer(b'{"model":' + b"[" * 100000 + b"]" * 100000 + b"}"), "tokenizer.json: no valid JSON"),
    ("a tokenizer of 1 TB, sparse", tokenizer(sparse(TERABYTE)), "tokenizer.json: is larger than"),
    ("a tokenizer that is a FIFO", tokenizer(lambda p: os.mkfifo(p)), "tokenizer.json: is not a regular file"),
    ("an id of 2^31", tokenizer(vocabulary(', "many": 2147483647')), "id 2147483647 in a vocabulary"),
    ("an id twice", tokenizer(vocabulary(', "many": 7')), "two tokens have the id 7"),
    ("an entry twice", tokenizer(vocabulary(', "!": 300')), "stands twice in the vocabulary"),
    ("a merge of nothing", tokenizer(vocabulary().replace(b'"merges":[]', b'"merges":["x y"]')), "merge"),
    ("a pattern that never ends", tokenizer(vocabulary().replace(b'{"type":"ByteLevel","add_prefix_space":false,"use_regex":true}', b'{"type":"Sequence","pretokenizers":[{"type":"Split","behavior":"Isolated","pattern":{"Regex":"(x|x)+[bd]"}},{"type":"ByteLevel","use_regex":false}]}')), "pattern cannot split"),
    ("a token beyond the model's", tokenizer(vocabulary(', "xx": 400').replace(b'"merges":[]', b'"merges":["x x"]')), "400"),
]  # fmt: skip


def limited():
    resource.setrlimit(resource.RLIMIT_CPU, (3 * SECONDS, 3 * SECONDS))


def attempt(command):
    """Exit code, what was printed, seconds, megabytes."""
    begin = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=limited)
    try:
        _, printed = process.communicate(timeout=3 * SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, b"", time.time() - begin, 0
    return process.returncode, printed, time.time() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def judge(result, expected):
    code, printed, seconds, megabytes = result
    lines = printed.decode(errors="replace").splitlines()
    if code is None:
        return "takes too long"
    if code != 1:
        return f"exit code {code}: {printed[-200:]!r}"
    if len(lines) != 1 or re.search(r"[\x00-\x1f\x7f]", lines[0]) or not re.search(expected, lines[0]):
        return f"says {printed[-300:]!r}, expected {expected}"
    if seconds > SECONDS:
        return f"took {seconds:.1f} s"
    return f"took {megabytes:.0f} MB" if megabytes > MEGABYTES else ""


def shrink(command, path):
    """The file becomes empty while its weights are mapped, after the first token."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    process.stdout.read(1)
    os.truncate(path, 0)
    _, printed = process.communicate(timeout=3 * SECONDS)
    return process.returncode, printed, 0, 0


def main():
    analyze, train, root = sys.argv[1:4]
    root, passed, failed = pathlib.Path(root), 0, 0
    prompt = "x" * 60 + "c"
    (root / "run.cfg").write_text("")
    (root / "text.txt").write_text((prompt + "\n") * 40)
    whole = Model(root / "whole")
    whole.write()
    kinds = {
        "analyze": lambda d: [analyze, "--models", f"m:{d}", "--prompt", prompt, "--generate", "1", "--threads", "1", "--output", root / "out"],
        "mapped": lambda d: [analyze, "--models", f"m:{d}", "--prompt", prompt, "--generate", "1", "--threads", "1", "--weights", "mapped", "--output", root / "out"],
        "train": lambda d: [train, root / "run.cfg", "--fresh", f"data={root / 'text.txt'}", f"init_from={d}", "max_steps=1", "threads=1", f"output_dir={root / 'run'}", "batch_size=1", "gradient_accumulation_steps=1", "max_seq_len=16", f"vocab_size={V}"],
    }
    for kind, command in kinds.items():
        code, printed, *_ = attempt(command(whole.directory))
        print(f"{'ok' if code == 0 else 'FAIL'} {kind} reads it whole" + ("" if code == 0 else f": {printed!r}"))
        passed, failed = passed + (code == 0), failed + (code != 0)
    for number, (name, spoil, expected) in enumerate(ATTACKS):
        model = Model(root / f"{number}")
        spoil(model)
        model.write()
        for kind, command in kinds.items():
            result = attempt(command(model.directory))
            why = judge(result, expected)
            if why or "--table" not in sys.argv:
                print(f"FAIL {kind}: {name}: {why}" if why else f"ok {kind}: {name}")
            elif kind == "analyze":
                line = result[1].decode(errors="replace").strip()
                print(f"{name} | {line.replace(f'{root}/{number}/', '')} | {result[2]:.2f} s")
            passed, failed = passed + (not why), failed + bool(why)
    long = Model(root / "long")
    long.config["max_position_embeddings"] = 200000
    long.write()
    command = [*kinds["mapped"](long.directory), "--generate", "150000"]
    why = judge(shrink(command, long.directory / "model.safetensors"), "became shorter while it was read")
    print(f"FAIL weights that shrink while they are mapped: {why}" if why else "ok weights that shrink while they are mapped")
    passed, failed = passed + (not why), failed + bool(why)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
