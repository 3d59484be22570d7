"""What a model makes of text it has not seen: nats per character, load balance, and a sample that must read as verse.

    evaluate.py CHECKPOINT --corpus FILE [--out FILE]     CHECKPOINT: an exported folder (export.py)

Loss is the sum of the negative log-probabilities of the last tenth's tokens over its characters, so that tokenizers
can be compared. It is an upper bound of the text's own loss: other segmentations of the same text are not counted.
"""
import argparse
import json
import math
import os
import re

import torch
import torch.nn.functional as F

from data import Corpus
from export import load_checkpoint
from model import balance_factors, LayerRouting

WINDOWS = ((256, 256), (256, 128), (512, 256), (1024, 256), (4096, 1024))  # (context, step)


@torch.no_grad()
def token_losses(model, ids, bos_id, window, stride, batch_tokens=16384, with_routing=False):
    """Negative log-probability of every id [n]; each is predicted once, from at most `window` tokens before it.

    stride == window: blocks, of which the first token sees one token. stride < window: the context slides, and from
    the second window on only the last `stride` positions count.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(ids, device=device)
    context = torch.cat([ids.new_tensor([bos_id]), ids[:-1]])
    begins = [0]
    while begins[-1] + window < len(ids):
        begins.append(begins[-1] + stride)
    losses, totals = torch.zeros(len(ids), device=device), None
    was_training = model.training
    model.eval()
    whole = [b for b in begins if b + window <= len(ids)]
    rest = [b for b in begins if b + window > len(ids)]
    size = max(1, batch_tokens // window)
    groups = [whole[i:i + size] for i in range(0, len(whole), size)] + [[b] for b in rest]
    for group in groups:
        width = min(window, len(ids) - group[0])
        at = torch.tensor(group, device=device)[:, None] + torch.arange(width, device=device)
        logits, routings = model(context[at])
        nll = F.cross_entropy(logits.flatten(0, 1), ids[at].flatten(), reduction="none").view_as(at)
        skip = torch.tensor([0 if b == 0 else window - stride for b in group], device=device)[:, None]
        counted = torch.arange(width, device=device)[None] >= skip
        losses[at[counted]] = nll[counted]
        if with_routing:
            totals = add_routing(totals, routings)
    model.train(was_training)
    return (losses, totals) if with_routing else losses


def add_routing(totals, routings):
    """Sums over sequences, so that factors can be taken over a whole text as if it were one sequence."""
    now = [(r.chosen.sum(0), (r.probability * r.tokens).sum(0), r.sent.sum(0), r.tokens * r.chosen.shape[0])
           for r in routings]
    return now if totals is None else [tuple(a + b for a, b in zip(x, y)) for x, y in zip(totals, now)]


def balance_report(totals, config):
    """Per MoE layer, over all tokens seen: what monitoring shows of a serving cluster."""
    out = []
    for index, (chosen, probability, sent, tokens) in enumerate(totals):
        one = LayerRouting(tokens, chosen[None], probability[None] / tokens, sent[None], None)
        expert, device, communication = balance_factors(one, config)
        per_device = chosen.view(config.n_group, -1).sum(-1)
        choices = tokens * config.num_experts_per_tok
        out.append({
            "layer": index + config.first_k_dense_replace,
            "B_exp": float(expert), "B_dev": float(device), "B_comm": float(communication),
            "fan_out": float(sent.sum() / tokens),
            "expert_max_over_mean": float(chosen.max() * config.n_routed_experts / choices),
            "experts_unused": int((chosen == 0).sum()),
            "device_max_over_mean": float(per_device.max() * config.n_group / choices),
            "received_max_over_mean": float(sent.max() * config.n_group / sent.sum()),
            "over_budget": float((per_device - choices / config.n_group).clamp(min=0).sum() / choices)})
    return out


def by_position(losses, window, buckets=4):
    """Mean loss per quarter of a window of blocks: does the model hold to the end of its declared length?"""
    blocks = losses[:len(losses) // window * window].view(-1, window)
    return [float(part.mean()) for part in blocks.chunk(buckets, 1)] if len(blocks) else []


@torch.no_grad()
def generate(model, ids, count, temperature=0.0, generator=None, forbidden=()):
    """Appends `count` ids; recomputes the prefix every time, which at this size is soon enough."""
    device = next(model.parameters()).device
    model.eval()
    ids = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids], device=device))[0][0, -1].float()
        logits[list(forbidden)] = -math.inf
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            probability = (logits / temperature).softmax(-1).cpu()
            ids.append(int(torch.multinomial(probability, 1, generator=generator)))
    return ids


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def sample_check(model, tokenizer, corpus_text, prompt="ROMEO:", tokens=200, temperature=0.7, samples=5, seed=1):
    """Samples from the prompt; how many words, how many of them the corpus has. The last word may be cut: not counted."""
    known, out = set(words(corpus_text)), []
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = [tokenizer.bos_id] + tokenizer.encode(prompt)
    for _ in range(samples):
        ids = generate(model, prompt_ids, tokens, temperature, generator, (tokenizer.bos_id, tokenizer.eos_id))
        text = tokenizer.decode(ids[len(prompt_ids):])
        found = words(text)[:-1]
        share = sum(w in known for w in found) / max(1, len(found))
        out.append({"words": len(found), "known_share": share, "text": prompt + text})
    return out


def evaluate(model, tokenizer, text, windows=WINDOWS):
    corpus = Corpus(text, tokenizer)
    characters = len(corpus.valid_text)
    report = {"characters": characters, "tokens": len(corpus.valid_ids), "nats_per_character": {}}
    for window, stride in windows:
        losses, totals = token_losses(model, corpus.valid_ids, tokenizer.bos_id, window, stride, with_routing=True)
        kind = "blocks" if window == stride else "sliding"
        report["nats_per_character"][f"{kind} {window}/{stride}"] = float(losses.double().sum() / characters)
        if window == 512:
            report["balance"] = balance_report(totals, model.config)
    long = model.config.max_position_embeddings
    losses = token_losses(model, corpus.valid_ids, tokenizer.bos_id, long, long)
    report[f"nats_per_token_by_quarter_of_{long}"] = by_position(losses, long)
    train_ids = tokenizer.encode(corpus.train_text)[:len(corpus.valid_ids)]
    losses = token_losses(model, train_ids, tokenizer.bos_id, 512, 256)
    report["train_nats_per_character sliding 512/256"] = float(losses.double().sum() / len(tokenizer.decode(train_ids)))
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", help="write the report here as JSON")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="one window only")
    arguments = parser.parse_args()
    model, tokenizer = load_checkpoint(arguments.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with open(arguments.corpus, encoding="utf-8") as f:
        text = f.read()
    report = evaluate(model, tokenizer, text, WINDOWS[2:3] if arguments.fast else WINDOWS)
    report["samples"] = sample_check(model, tokenizer, text, samples=arguments.samples)
    shown = dict(report, samples=[{k: v for k, v in s.items() if k != "text"} for s in report["samples"]])
    print(json.dumps(shown, indent=1))
    for s in report["samples"][:1]:
        print(s["text"])
    if arguments.out:
        os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
        with open(arguments.out, "w") as f:
            json.dump(report, f, indent=1)
    good = all(s["words"] >= 40 and s["known_share"] >= 0.93 for s in report["samples"])
    print(f"at least 40 words, 93 % of them known, in every sample: {'yes' if good else 'NO'}")


if __name__ == "__main__":
    main()
