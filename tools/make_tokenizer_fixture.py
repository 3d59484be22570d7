#!/usr/bin/env python3
"""Writes libs/tokenizer/testdata/deepseek_style: a small tokenizer.json with DeepSeek-V2's pre-tokenizer rules,
its tokenizer_config.json, and cases.json, what an independent encoder (this one: Python's re, merges applied one
at a time) makes of a list of texts. Standard library only; deterministic.

    python3 tools/make_tokenizer_fixture.py
"""
import collections
import json
import pathlib
import random
import re
import unicodedata

OUT = pathlib.Path(__file__).resolve().parent.parent / "libs/tokenizer/testdata/deepseek_style"

# Small enough to be read in a diff, wide enough that merges cross every rule.
TRAINING_TEXT = """
The gateway takes a request and the attention node owns it until the last token has been sent to the client.
Every layer asks the router which experts the row needs, and the expert servers answer with partial sums that are
added in the order of the groups. The result does not depend on the server that answered, nor on the placement!
It's the reader's turn: don't hurry, you'll see that we've said what they're for, and I'm done.
def encode(text: str) -> list[int]:
    return [table[byte] for byte in text.encode("utf-8")]
The year 2024 had 366 days; 1024 + 1024 = 2048, and 3.14159 is not pi.
Сервер отвечает на запрос, и сервер считает сумму. Сервер снова отвечает на запрос.
这个服务器回答了请求，这个服务器计算总和。这个服务器再次回答了请求。
서버가 요청에 응답하고 서버가 합계를 계산합니다.
Fünf größere Äpfel kosten über zwölf Euro, sagte die Köchin; ça coûte déjà trop cher à la fête.
""" * 3

CASED = {"Lu", "Ll", "Lt"}
# Scripts with case, as DeepSeek's rule lists them; U+10FFFF is the end of Unicode.
CASED_BLOCKS = [(0x41, 0x5A), (0x61, 0x7A), (0xB5, 0x590), (0x10A0, 0x10C5), (0x13A0, 0x13FD), (0x1C90, 0x1CBF),
                (0x1D00, 0x214E), (0x2183, 0x2184), (0x2C00, 0x2CF3), (0xA640, 0xA78E), (0xAB70, 0xABBF),
                (0xFB00, 0xFB17), (0xFF21, 0xFF5A), (0x10400, 0x1044F), (0x104B0, 0x104FB), (0x10C80, 0x10CF2),
                (0x118A0, 0x118DF), (0x1E900, 0x1E943)]


def cased_letter_class():
    points = [c for low, high in CASED_BLOCKS for c in range(low, high + 1) if unicodedata.category(chr(c)) in CASED]
    ranges = []
    for c in points:
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return "".join(chr(a) if a == b else chr(a) + "-" + chr(b) for a, b in ranges)


PATTERNS = [
    "[\r\n]",
    "\\s?[" + cased_letter_class() + "]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
]


def byte_characters():
    """GPT-2's map: printable bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(0x100 + extra)
            extra += 1
    return table


BYTES = byte_characters()
# These bytes never occur in UTF-8. DeepSeek's vocabulary leaves them out, and its added tokens hold the characters
# of their byte map instead: U+00F8, U+00F6 and so on, not special, so that text contains them.
NEVER_IN_UTF8 = [0xC0, 0xC1, *range(0xF5, 0x100)]
LITERALS = "øöúÿõ÷ûýÀùÁþü"


def isolate(pieces, pattern):
    compiled, out = re.compile(pattern), []
    for piece in pieces:
        at = 0
        for match in compiled.finditer(piece):
            if match.start() > at:
                out.append(piece[at:match.start()])
            out.append(match.group())
            at = match.end()
        if at < len(piece):
            out.append(piece[at:])
    return out


def pre_tokenize(text):
    pieces = [text] if text else []
    for pattern in PATTERNS:
        pieces = isolate(pieces, pattern)
    digits = []
    for piece in pieces:
        run = ""
        for c in piece:
            if unicodedata.category(c).startswith("N"):
                if run:
                    digits.append(run)
                    run = ""
                digits.append(c)
            else:
                run += c
        if run:
            digits.append(run)
    return ["".join(BYTES[b] for b in piece.encode()) for piece in digits]


def train(text, merges_max):
    words = collections.Counter(pre_tokenize(text))
    split = {word: list(word) for word in words}
    merges = []
    while len(merges) < merges_max:
        pairs = collections.Counter()
        for word, count in words.items():
            symbols = split[word]
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 4:
            break
        merges.append(best)
        for word in split:
            split[word] = merge(split[word], best)
    return merges


def merge(symbols, pair):
    out, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def encode(text, vocab, merges, literals):
    ids = []
    for part in re.split("([" + LITERALS + "])", text):
        if part in literals:
            ids.append(literals[part])
            continue
        for word in pre_tokenize(part):
            symbols = list(word)
            for pair in merges:          # in order of rank, all occurrences left to right
                if len(symbols) < 2:
                    break
                symbols = merge(symbols, pair)
            ids += [vocab[s] for s in symbols]
    return ids


def cases(vocab, merges, literals):
    rng = random.Random(7)
    texts = ["", " ", "  ", "\t", "\n", "\n\n", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "Hello world",
             " Hello World!", "Hello, y'all! How are you 😁 ?我想在server工作1314151天～", "ied 4 ½ months", "Äpfel",
             "Führer größer øre", "2024 ٣٤ Ⅷ ²", "Сервер отвечает", "这个服务器。回答", "서버가 요청에", "    return x\n",
             "end of line   ", "tabs\t\tand　ideographic space", "e\u0301 combining", "'s 're don't IT'S",
             "<｜begin▁of▁sentence｜>not special<｜User｜>", "\u00a0nbsp\u2003em", "😁😁👩‍👩‍👧", "ﬀ ﬁ ＡＢＣ！", "a" * 300,
             " " * 70 + "5", "\u1e9e\u0130i\u0307", "x̄ ȳ", "\x00\x01\x7f", "ä̈ö̈ü"]
    alphabets = ["abc de\n", "servr qu.,!", "0123456789 ", "сервотча ", "这个服务器回答了请求，。", "aöé😁 \t", "서버가요청 "]
    for _ in range(200):
        alphabet = rng.choice(alphabets) + rng.choice(alphabets)
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60))))
    return [{"text": text, "ids": encode(text, vocab, merges, literals)} for text in texts]


def added(token_id, content, special):
    return {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def main():
    merges = train(TRAINING_TEXT, 400)
    vocab = {}
    for byte in range(256):
        if byte not in NEVER_IN_UTF8:
            vocab[BYTES[byte]] = len(vocab)
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    base = len(vocab)
    literals = {c: base + 2 + i for i, c in enumerate(LITERALS)}
    after = base + 2 + len(LITERALS)
    tokens = [added(base, "<｜begin▁of▁sentence｜>", True), added(base + 1, "<｜end▁of▁sentence｜>", True)]
    tokens += [added(i, c, False) for c, i in literals.items()]
    tokens += [added(after, "<｜User｜>", False), added(after + 1, "<｜Assistant｜>", False)]
    split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in PATTERNS]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split + [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [a + " " + b for a, b in merges]},
    }
    config = {
        "add_bos_token": True, "add_eos_token": False, "model_max_length": 16384, "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "lstrip": False, "normalized": True,
                      "rstrip": False, "single_word": False},
        "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>", "lstrip": False, "normalized": True,
                      "rstrip": False, "single_word": False},
        "chat_template": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + "
                         "m['content'] + '\\n\\n' }}{% endif %}{% endfor %}{{ 'Assistant:' }}",
    }
    OUT.mkdir(parents=True, exist_ok=True)
    for name, value in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config),
                        ("cases.json", cases(vocab, merges, literals))]:
        (OUT / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{len(vocab)} tokens, {len(merges)} merges, ids from {base} added")


if __name__ == "__main__":
    main()
