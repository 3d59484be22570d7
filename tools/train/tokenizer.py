"""Byte-level BPE: training, encoding with and without BPE-dropout, and the published tokenizer files.

Small and dependency-free on purpose: the corpus is a megabyte, and dropout (Provilkov et al., arXiv 1910.13267)
needs the merge loop anyway. train_test.py compares it with the `tokenizers` package where that is installed, and
Minke's own tokenizer reads the files it writes.

    tokenizer.py CORPUS DIR --vocab-size 512      train on a text and write DIR/tokenizer*.json
"""
import argparse
import collections
import json
import os
import re

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

# One alternative per class of character, so that every character falls in exactly one piece and merges never cross
# from a word into punctuation. Only ASCII classes: Python's re, Oniguruma and PCRE2 then agree on every input.
PATTERN = r"[\r\n]| ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9 \r\n]+| +"

# The template of DeepSeek-V2-Chat: no role tokens, and no space after the generation prompt.
V2_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")


def byte_characters():
    """GPT-2's map from bytes to printable characters: itself where printable, else the next free code point."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, spare = {b: chr(b) for b in printable}, 0x100
    for b in range(256):
        if b not in table:
            table[b] = chr(spare)
            spare += 1
    return [table[b] for b in range(256)]


class Tokenizer:
    """Ids 0..255 are the bytes, then the merges in order; BOS and EOS are the last two ids of the vocabulary."""

    def __init__(self, merges):
        self.merges = [tuple(m) for m in merges]
        self.token_bytes = [bytes([b]) for b in range(256)]
        for left, right in self.merges:
            self.token_bytes.append(self.token_bytes[left] + self.token_bytes[right])
        self.rank = {pair: 256 + i for i, pair in enumerate(self.merges)}  # pair -> the id it becomes
        self.bos_id, self.eos_id = len(self.token_bytes), len(self.token_bytes) + 1
        self.vocab_size = len(self.token_bytes) + 2
        self.cache = {}

    @staticmethod
    def pieces(text):
        return re.findall(PATTERN, text)

    def segment(self, piece, dropout=0.0, random=None):
        """Ids of one piece; with dropout each possible merge is passed over with that probability, at every step."""
        ids = list(piece.encode("utf-8"))
        while len(ids) > 1:
            # The lowest id is the earliest merge; the leftmost of equals goes first.
            best = min(((self.rank.get(pair, 1 << 30), i) for i, pair in enumerate(zip(ids, ids[1:]))
                        if not dropout or random() >= dropout), default=(1 << 30, 0))
            if best[0] == 1 << 30:
                break
            ids[best[1]:best[1] + 2] = [best[0]]
        return ids

    def encode(self, text):
        out = []
        for piece in self.pieces(text):
            if piece not in self.cache:
                self.cache[piece] = self.segment(piece)
            out += self.cache[piece]
        return out

    def decode(self, ids):
        return b"".join(self.token_bytes[i] for i in ids if i < len(self.token_bytes)).decode("utf-8", "replace")

    def save(self, directory):
        os.makedirs(directory, exist_ok=True)
        characters = byte_characters()
        name = lambda token: "".join(characters[b] for b in self.token_bytes[token])
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        special = lambda i, content: {"id": i, "content": content, "single_word": False, "lstrip": False,
                                      "rstrip": False, "normalized": False, "special": True}
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [special(self.bos_id, BOS), special(self.eos_id, EOS)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {name(i): i for i in range(len(self.token_bytes))},
                      "merges": [f"{name(left)} {name(right)}" for left, right in self.merges]}}
        config = {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
                  "clean_up_tokenization_spaces": False, "model_max_length": 4096,
                  "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": V2_CHAT_TEMPLATE}
        for file, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            with open(os.path.join(directory, file), "w", encoding="utf-8") as f:
                f.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    @staticmethod
    def load(directory):
        with open(os.path.join(directory, "tokenizer.json"), encoding="utf-8") as f:
            model = json.load(f)["model"]
        merges = [[model["vocab"][half] for half in merge.split(" ")] for merge in model["merges"]]
        return Tokenizer(merges)


def train(text, vocab_size):
    """Greedy BPE: the most frequent pair becomes a token, until 256 bytes + merges + BOS + EOS fill the vocabulary."""
    counts = collections.Counter(Tokenizer.pieces(text))
    words = [(list(piece.encode("utf-8")), count) for piece, count in sorted(counts.items())]
    pair_count, pair_words = collections.Counter(), collections.defaultdict(set)
    for w, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += count
            pair_words[pair].add(w)
    merges = []
    while len(merges) < vocab_size - 258:
        best = max(pair_count, key=lambda pair: (pair_count[pair], -pair[0], -pair[1]), default=None)
        if best is None or pair_count[best] < 2:
            raise SystemExit(f"the corpus has only {len(merges)} merges; {vocab_size - 258} were asked for")
        new = 256 + len(merges)
        merges.append(best)
        for w in list(pair_words.pop(best)):
            ids, count = words[w]
            for pair in zip(ids, ids[1:]):
                pair_count[pair] -= count
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [new]
                i += 1
            for pair in zip(ids, ids[1:]):
                pair_count[pair] += count
                pair_words[pair].add(w)
        del pair_count[best]
    return Tokenizer(merges)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("directory")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--fraction", type=float, default=0.9, help="leading part of the corpus that may be seen")
    arguments = parser.parse_args()
    with open(arguments.corpus, encoding="utf-8") as corpus:
        content = corpus.read()
    seen = content[:int(len(content) * arguments.fraction)]
    tokenizer = train(seen, arguments.vocab_size)
    tokenizer.save(arguments.directory)
    ids = tokenizer.encode(content)
    print(f"{tokenizer.vocab_size} tokens, {len(content) / len(ids):.3f} characters per token")
