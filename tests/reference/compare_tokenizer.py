"""The tokens of a text by the `tokenizers` library against ours, and a vocabulary learned by both, with times.

    compare_tokenizer.py encode TOKENIZER TEXT TOKENS.u32         exit 1 where they differ
    compare_tokenizer.py train TEXT VOCAB_SIZE TOKENIZER          the same vocabulary and merges; prints the library's seconds
"""

import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def read_text(path):
    return open(path, "rb").read().decode(errors="replace")


def encode(tokenizer_path, text_path, tokens_path):
    tokenizer, text = Tokenizer.from_file(tokenizer_path), read_text(text_path)
    begin = time.time()
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    seconds = time.time() - begin
    ours = np.fromfile(tokens_path, "<i4")
    n = min(len(ids), len(ours))
    first = next(iter(np.flatnonzero(ids[:n] != ours[:n])), n)
    print(f"{len(text.encode()) / seconds / 1e6:.1f} MB/s")
    if first < max(len(ids), len(ours)):
        near = slice(max(0, first - 3), first + 3)
        sys.exit(f"token {first} differs: {ids[near]} and {ours[near]} of {len(ids)} and {len(ours)}")


def train(text_path, vocab_size, tokenizer_path):
    ours = Tokenizer.from_file(tokenizer_path)
    theirs = Tokenizer(models.BPE())
    theirs.normalizer, theirs.pre_tokenizer = ours.normalizer, ours.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=int(vocab_size),
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = read_text(text_path)
    begin = time.time()
    theirs.train_from_iterator([text], trainer)
    print(f"{time.time() - begin:.2f}")
    model, expected = (json.loads(t.to_str())["model"] for t in (ours, theirs))
    for key in ("vocab", "merges"):
        if model[key] != expected[key]:
            sys.exit(f"{key} differ")


globals()[sys.argv[1]](*sys.argv[2:])
