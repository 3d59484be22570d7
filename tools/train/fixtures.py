"""Golden files of the shipped model, from the training code itself: tests/golden/shakespeare_{logits,greedy}.json.

    fixtures.py CHECKPOINT --corpus FILE --out tests/golden [--oracle deepseek_v2_reference.py]

Computed from the exported BF16 weights, widened, with all arithmetic in float32. With --oracle (a module whose
Model.load(dir).forward(ids).logits is an independent implementation) it also says how far the two are apart.
"""
import argparse
import importlib.util
import json
import os

import numpy as np
import torch

from data import Corpus
from export import load_checkpoint

SEQUENCES, LENGTH, TOP = 3, 96, 5
# 0.01 would do for float32, but not for bf16 serving: a prompt whose closest call was 0.024 came out differently there.
PROMPTS, GREEDY, GAP_MIN, CANDIDATES = 3, 64, 0.1, 40


@torch.no_grad()
def log_probabilities(model, ids):
    return torch.log_softmax(model(torch.tensor([ids]))[0][0].double(), -1)


def logits_fixture(model, tokenizer, corpus):
    """Held-out tokens from three places; the first begins with BOS, as serving does."""
    out = []
    for i in range(SEQUENCES):
        begin = len(corpus.valid_ids) * (2 * i + 1) // (2 * SEQUENCES)
        ids = corpus.valid_ids[begin:begin + LENGTH].tolist()
        if i == 0:
            ids = [tokenizer.bos_id] + ids[:-1]
        log_p = log_probabilities(model, ids)
        top = log_p.topk(TOP, -1)
        rounded = lambda x: [round(float(v), 5) for v in x]
        out.append({"ids": ids, "next_logprobs": rounded(log_p[torch.arange(LENGTH - 1), ids[1:]]),
                    "top_ids": top.indices.tolist(), "top_logprobs": [rounded(row) for row in top.values]})
    return out


def greedy(model, tokenizer, prompt):
    """Follows the best token until the second best comes within GAP_MIN nats: from there on rounding may decide."""
    ids = [tokenizer.bos_id] + tokenizer.encode(prompt)
    prompt_ids, gaps, cut_gap = list(ids), [], None
    for _ in range(GREEDY):
        top = log_probabilities(model, ids)[-1].topk(2)
        gap = float(top.values[0] - top.values[1])
        if gap < GAP_MIN:
            cut_gap = round(gap, 5)
            break
        gaps.append(round(gap, 5))
        ids.append(int(top.indices[0]))
    new = ids[len(prompt_ids):]
    return {"prompt": prompt, "prompt_ids": prompt_ids, "ids": new, "text": tokenizer.decode(new), "gaps": gaps,
            "gap_min": min(gaps, default=None), "cut_at_gap": cut_gap}


def greedy_fixture(model, tokenizer, corpus):
    """Of held-out speeches' names and first lines, the three whose continuation stays clear of close calls longest."""
    speeches = [speech.split("\n") for speech in corpus.valid_text.split("\n\n")[1:-1]]
    openings = [lines[0] + "\n" + lines[1] + "\n" for lines in speeches if len(lines) > 3 and lines[0].endswith(":")]
    found = [greedy(model, tokenizer, prompt) for prompt in openings[::max(1, len(openings) // CANDIDATES)]]
    found.sort(key=lambda g: (-len(g["ids"]), -(g["gap_min"] or 0)))
    return found[:PROMPTS]


def against_oracle(path, checkpoint, sequences):
    """Largest differences in log-probability between the fixture and an independent float64 implementation."""
    spec = importlib.util.spec_from_file_location("oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    oracle, worst_next, worst_top, same = module.Model.load(checkpoint), 0.0, 0.0, True
    for s in sequences:
        logits = oracle.forward(s["ids"]).logits
        logits = logits - logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        theirs = log_p[np.arange(LENGTH - 1), s["ids"][1:]]
        worst_next = max(worst_next, np.abs(theirs - s["next_logprobs"]).max())
        top = np.take_along_axis(log_p, np.array(s["top_ids"]), 1)
        worst_top = max(worst_top, np.abs(top - s["top_logprobs"]).max())
        same &= bool((log_p.argmax(-1) == np.array(s["top_ids"])[:, 0]).all())
    return {"next_logprobs": float(worst_next), "top_logprobs": float(worst_top), "same_best_token": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--oracle")
    arguments = parser.parse_args()
    model, tokenizer = load_checkpoint(arguments.checkpoint)
    with open(arguments.corpus, encoding="utf-8") as f:
        corpus = Corpus(f.read(), tokenizer)
    name = os.path.basename(os.path.normpath(arguments.checkpoint))
    about = {"model": name, "made_by": "tools/train/fixtures.py", "arithmetic": "float32, weights BF16"}
    sequences = logits_fixture(model, tokenizer, corpus)
    if arguments.oracle:
        about["largest_difference_from_float64_oracle"] = against_oracle(arguments.oracle, arguments.checkpoint, sequences)
        print(about["largest_difference_from_float64_oracle"])
    prompts = greedy_fixture(model, tokenizer, corpus)
    for file, value in (("shakespeare_logits.json", {**about, "sequences": sequences}),
                        ("shakespeare_greedy.json", {**about, "gap_limit": GAP_MIN, "prompts": prompts})):
        path = os.path.join(arguments.out, file)
        with open(path, "w", encoding="utf-8") as f:
            f.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
        print(f"{path}: {os.path.getsize(path)} bytes")
    for g in prompts:
        print(f"{g['prompt']!r} -> {len(g['ids'])} tokens, smallest gap {g['gap_min']}: {g['text']!r}")


if __name__ == "__main__":
    main()
