"""data/unicode.h: where the `tokenizers` library's tables of Unicode differ from those of PCRE2 and utf8proc.

    .venv/bin/python tests/reference/make_unicode.py            # writes data/unicode.h
    .venv/bin/python tests/reference/make_unicode.py --check    # recomputes and compares, writes nothing

The library is asked about each character. `unicodedata` (Unicode 14 in Python 3.11, as in PCRE2 10.42) and the package
`regex` (which is newer) say what others think of it.
"""

import pathlib
import sys
import unicodedata

import regex
from tokenizers import Regex, normalizers, pre_tokenizers

FILE = pathlib.Path(__file__).parents[2] / "data/unicode.h"
CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
LOWEST_MARK, HIGH_MARK = "\u0334", "\u0300"  # combining classes 1 and 230

HEAD = """/* data/unicode.h - where the `tokenizers` library's tables of Unicode differ from those of PCRE2 and utf8proc: what a library
 * learned later, or not yet, is to it unassigned. For tokenizer.h, whose tokens are to be the library's.
 *
 * Written by tests/reference/make_unicode.py.
 */
#ifndef DATA_UNICODE_H
#define DATA_UNICODE_H

/* clang-format off */
"""


def ranges(characters):
    out = []
    for code in sorted(map(ord, characters)):
        if out and out[-1][1] == code - 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return out


def table(rows, indent, width=116):
    lines = [""]
    for row in rows:
        if len(lines[-1]) + len(row) > width - indent:
            lines.append("")
        lines[-1] += row
    return [line.strip() for line in lines]


def added(category):
    """What the library's regular expressions have in a category and Unicode 14 has not, for a class of PCRE2."""
    split = pre_tokenizers.Split(Regex(rf"\p{{{category}}}"), "removed")
    new = [c for c in CHARACTERS if unicodedata.category(c)[0] != category and not split.pre_tokenize_str(c)]
    rows = [rf"\\x{{{a:x}}}" + (rf"-\\x{{{b:x}}}" if b > a else "") for a, b in ranges(new)]
    return " \\\n".join(f'    "{line}"' for line in table(rows, 8))


def late_marks():
    """What newer tables order or compose, and the library leaves as it is."""
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    late = {unicodedata.normalize("NFD", c)[-1] for c in CHARACTERS if nfd(c) != unicodedata.normalize("NFD", c)}
    for c in CHARACTERS:
        moves = nfc(c + LOWEST_MARK) != c + LOWEST_MARK or nfc(HIGH_MARK + c) != HIGH_MARK + c
        if not moves and not regex.match(r"\p{ccc=0}", c):
            late.add(c)
    rows = [f"{{0x{a:X}, 0x{b:X}}}, " for a, b in ranges(late)]
    return "\n".join(f"    {line}" for line in table(rows, 4))


def main():
    text = HEAD
    for name, category, meaning in (("LETTERS", "L", "letters"), ("NUMBERS", "N", "numbers")):
        text += f"\n/* \\p{{{category}}}: {meaning} of Unicode 15 and 16, as ranges of a class. */\n"
        text += f"#define DATA_LATE_{name} \\\n{added(category)}\n"
    text += "\n/* NFC: marks and last parts of composed characters, first to last, that are younger than Unicode 9. */\n"
    text += f"#define DATA_LATE_MARKS \\\n" + late_marks().replace("\n", " \\\n") + "\n/* clang-format on */\n\n#endif\n"
    if "--check" in sys.argv:
        sys.exit(FILE.read_text() != text)
    FILE.write_text(text)


main()
