"""Small tokenizers and what the `tokenizers` library makes of texts that are hard to cut, for tests/test_tokenizer.c.

    .venv/bin/python tests/reference/make_tokenizers.py            # writes tests/fixtures/tokenizers/
    .venv/bin/python tests/reference/make_tokenizers.py --check    # recomputes and compares, writes nothing

text.txt is what the vocabularies are learned from, and with `qwen.json` the expectation for our own trainer. cases.json
has the texts (hexadecimal, since some are no UTF-8), and for each tokenizer and text the ids without and with special
tokens, and the bytes that they stand for.
"""

import json
import os
import pathlib
import random
import sys

os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DIRECTORY = pathlib.Path(__file__).parents[1] / "fixtures/tokenizers"
VOCAB_SIZE = 420
DECODED = ("chat", "removed")  # for which the bytes are stored; the others' are much the same

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

PROSE = """The gate decides, for every head and every position, how much of what attention has gathered may pass.
Without it a head that has nothing to say must still put its attention somewhere; it's parked on the first token.
Ein Kopf, der nichts zu sagen hat, schaut trotzdem irgendwohin: auf das erste Zeichen. Größe, Übermaß, Straße.
Une tête qui n'a rien à dire regarde quand même quelque part : le premier mot. Où ça ? Là-bas, naïf Noël.
Голова, которой нечего сказать, всё равно куда-то смотрит. Η κεφαλή που δεν έχει τίποτα να πει κοιτάζει κάπου.
没有门控的注意力头即使无话可说,也必须把注意力放在某处。ゲートのない頭は最初の単語を見る。게이트가 없으면 첫 단어를 본다.
الرأس الذي ليس لديه ما يقوله ينظر إلى أول كلمة. ראש שאין לו מה לומר מביט במילה הראשונה. जिस सिर के पास कहने को कुछ नहीं।
for (size_t i = 0; i < n; i++) {\n\tif (x[i] > 0.5) sum += x[i] * 1234567;\n}\nreturn sum / (double)n;  // 2024-05-10
"""

HARD = {
    "empty": "",
    "space": " ",
    "spaces": "   a    b     ",
    "long spaces": "x" + " " * 300 + "y",
    "tabs and lines": "\t\ta\n\n\n b\r\n\r\nc \n d\n \n\n  e\r",
    "only lines": "\n" * 7 + "\r\r\n",
    "contractions": "it's I'LL we'Re don'T 'tis y'all've 'ſ '\u017f'S",
    "apostrophes": "' ''  '''s ' s",
    "digits": "0 12 345 6789 1234567890123 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 一二三",
    "words and digits": "a1b22c333 x2 v1.2.3-rc4",
    "accents": "naïve façade Ångström ÅΩ ÿ ñ e\u0301 n\u0303 A\u030a \u212b \u2126",
    "marks in another order": "a\u0323\u0301 a\u0301\u0323 q\u0307\u0323 \u1e0b\u0323 s\u0323\u0307",
    "many marks": "e" + "\u0301\u0323\u0308" * 40 + " o",
    "hangul": "한국어 \u1112\u1161\u11ab\u1100\u116e\u11a8 가\u11a8 \uac00\u11a7",
    "compatibility": "ﬁ ﬃ ＡＢＣ １２ ㎏ ℃ ™ ½ \ufb00",
    "singletons": "\u0340 \u0374 \u037e \u0387 \u1fef \u2000 \u2329 \uf900 \U0002f800",
    "excluded": "\u0958 \u0f73 \ufb1d \u2adc \U0001d15e",
    "scripts": "Ελληνικά кириллица עברית العربية हिन्दी বাংলা தமிழ் ไทย ລາວ ខ្មែរ မြန်မာ ქართული አማርኛ ᏣᎳᎩ 中文 日本語 한국어",
    "no spaces between words": "这是一个没有空格的长句子用来测试分词器的行为。これは空白のない長い文です。",
    "emoji": "😀👍🏽👨‍👩‍👧‍👦🇩🇪 ❤️ ☺ 🏴\U000e0067\U000e0062\U000e007f 1️⃣",
    "joiners": "a\u200bb c\u200dd e\u2060f \ufeffg \u00adh",
    "white spaces": "a\u00a0b\u1680c\u2003d\u2028e\u2029f\u202fg\u205fh\u3000i\u180ej\u0085k\u200bl\x0bm\x0cn",
    "control characters": "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "latin": "".join(map(chr, range(0xA0, 0x180))),
    "private": "\ue000\uf8ff\U000f0000\U0010fffd\ufffe\uffff",
    "code": 'def f(x):\n    return {"a": [x**2 for _ in range(10)]}  # comment\n\n\nclass A:\n\tpass\n',
    "c": "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", a->b[3] & ~0x7Fu); return 0; }\n",
    "html": '<a href="https://example.org/?q=1&amp;r=2">x</a><!-- y -->\n<br/>',
    "punctuation": "!!! ... --- ?! (a) [b] {c} «d» “e” …\n!\n?\r\n.",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β ≠ ∅, ∑ᵢ xᵢ² ≤ 10⁻³",
    "special": "<|endoftext|>a<|im_start|> user\nb<|im_end|>\n<|im_start|><|im_start|>",
    "nearly special": "<|endoftext|><|endoftext|<|endof text|> <|im_startx|> <think>x</think> <mask <mas",
    "stripping": "a  <mask>  b <r>  \n c<mask><r> <r> <mask>\u3000d",
    "single words": "word words sword word. _word word_ wordé éword word",
    "normalized": "x caf\u00e9! cafe\u0301! caf\u00e9 ! \u00c5ngs",
    "added and pattern": "don't<|im_end|>'t <|im_end|>  <|im_end|>\n\n<|im_end|>7",
    "not merged": "an ignored ignore ignored",
    "repeated": "ababababab" * 12 + "the the the thethethe",
    "one letter": "a" * 200,
    "replacement": "\ufffd \ufffd\ufffd",
}
BROKEN = {
    "lone continuation": b"a\x80b\xbf\xbf",
    "cut character": b"x\xe2\x82 y\xf0\x9f\x98",
    "overlong": b"\xc0\xaf \xe0\x80\xaf \xf0\x80\x80\xaf",
    "surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "too large": b"\xf4\x90\x80\x80 \xf5\x80\x80\x80 \xff\xfe",
    "latin-1": "naïve façade".encode("latin-1"),
    "cut by a mark": b"e\xcc\x81\xcc",
}
# Where libraries' tables of Unicode differ (data/unicode.h): letters and numbers of 15 and 16, marks younger than 9.
LATE = {
    "late letters": "a\U00010d4ab\U00010d65 \U0001e030! x\U000323af\U0002ebf0\u1c89 \U00016d40's \ua7cb\U0001e5f0\n",
    "late numbers": "1\U00011f502 \U0001d2c0 a\U00011bf9 \U00016130\U0001e4f0\U0001e5f1x",
    "late marks": "e\u1ac1\u0323 e\u0301\u1abf\u0323\u0301 \u08ca\u0334 \U00011935\U00011930\u0323 a\U0001e08f\u0334 \u09fe",
}


def random_texts():
    """Characters that meet seldom, by chance."""
    draw = random.Random(1)
    pool = [0x20, 0x20, 0x0A, 0x0D, 0x09, 0x61, 0x41, 0x27, 0x73, 0x37, 0x2E, 0xE9, 0x301, 0x323, 0x3B1, 0x5D0, 0x4E2D]
    pool += [0xAC00, 0x1100, 0x1161, 0x11A8, 0x1F600, 0x200D, 0xA0, 0x3000, 0x17F, 0x130, 0xDF, 0x2126, 0x958, 0x5F]
    return {f"random {i}": "".join(chr(draw.choice(pool)) for _ in range(80)) for i in range(8)}


def all_texts():
    texts = {name: text.encode() for name, text in {**HARD, **random_texts()}.items()}
    texts["bytes"] = bytes(random.Random(2).randrange(256) for _ in range(120))
    return list({**texts, **BROKEN}.values()), [text.encode() for text in LATE.values()]


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "trim_offsets": False, "use_regex": False, **settings})


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def learned(text, steps, normalizer=None, **settings):
    tokenizer = Tokenizer(models.BPE(**settings))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            min_frequency=2,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


def with_entry(tokenizer, ignore_merges):
    """With an entry that no merge makes: with ignore_merges it is found, without it is not."""
    file = json.loads(tokenizer.to_str())
    file["model"]["ignore_merges"] = ignore_merges
    file["model"]["vocab"]["Ġignored"] = VOCAB_SIZE
    return Tokenizer.from_str(json.dumps(file))


def make_tokenizers(text):
    special = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    qwen = with_entry(learned(text, [split(QWEN), byte_level()], normalizers.NFC()), ignore_merges=False)
    chat = learned(text, [split(QWEN), byte_level()], normalizers.Sequence([normalizers.NFC()]))
    chat.add_special_tokens(special)
    chat.add_tokens([AddedToken("<think>", normalized=False), AddedToken("café!", normalized=True), "Ångs"])
    gpt2 = learned(text, [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)])
    gpt2.add_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<r>", rstrip=True), AddedToken("word", single_word=True)])
    gpt2.post_processor = processors.ByteLevel(trim_offsets=False)
    llama = with_entry(learned(text, [split(LLAMA), byte_level()]), ignore_merges=True)
    llama.add_special_tokens(special)
    ids = [(token, llama.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")]
    template = processors.TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=ids)
    llama.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    digits = learned(text, [pre_tokenizers.Digits(individual_digits=True), split(r"\P{L}\S\P{N}"), byte_level(add_prefix_space=True, use_regex=True)])
    removed = learned(text, [split(r"\s+", "removed"), split(r"\p{L}+|\p{N}", "removed", True), byte_level()])
    runs = learned(text, [pre_tokenizers.Digits(), pre_tokenizers.Split("a.", "isolated"), split("x*"), byte_level()])
    made = {"qwen": qwen, "chat": chat, "gpt2": gpt2, "llama": llama, "digits": digits, "removed": removed, "runs": runs}
    files = {name: json.loads(tokenizer.to_str()) for name, tokenizer in made.items()}
    files["gpt2"]["model"]["merges"] = [" ".join(pair) for pair in files["gpt2"]["model"]["merges"]]
    # A vocabulary that lacks bytes: they are left out.
    lacking = files["removed"]["model"]["vocab"]
    used = {part for pair in files["removed"]["model"]["merges"] for part in pair}
    for character in "ÿĀāĂ":
        assert character not in used
        del lacking[character]
    return files


def byte_characters():
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def bytes_of(tokenizer, ids):
    characters, out = byte_characters(), b""
    for token in map(tokenizer.id_to_token, ids):
        known = all(c in characters for c in token)
        out += bytes(characters[c] for c in token) if known else token.encode()
    assert out.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)
    return out


def make_cases(files, texts):
    cases = {}
    for name, file in files.items():
        tokenizer = Tokenizer.from_str(json.dumps(file))
        rows = []
        for text in texts:
            text = text.decode(errors="replace")
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            special = tokenizer.encode(text, add_special_tokens=True).ids
            extra = [special[0], special[-1]] if len(special) == len(ids) + 2 else []
            assert special == (extra[:1] + ids + extra[1:])
            decoded = bytes_of(tokenizer, ids).hex()
            rows.append({"ids": ids, "around": extra} | ({"bytes": decoded} if name in DECODED else {}))
        cases[name] = rows
    return cases


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main():
    texts, late = all_texts()
    plain = [t.decode() for t in texts if t.decode(errors="replace").encode() == t and b"<|endoftext|>" not in t]
    text = PROSE + "\n".join(plain)
    files = make_tokenizers(text)
    texts += late
    cases = {"texts": [t.hex() for t in texts], **make_cases(files, texts)}
    out = {f"{name}.json": compact(file) for name, file in files.items()}
    out |= {"text.txt": text, "cases.json": compact(cases).replace('],"', '],\n"').replace("},{", "},\n{") + "\n"}
    if "--check" in sys.argv:
        different = [n for n, t in out.items() if (DIRECTORY / n).read_bytes() != t.encode()]
        sys.exit(f"differ: {different}" if different else 0)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, content in out.items():
        (DIRECTORY / name).write_bytes(content.encode())
    print(f"{DIRECTORY}: {len(texts)} texts, {len(files)} tokenizers")


main()
