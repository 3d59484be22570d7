"""Trains a small DeepSeek-V2 on one text.

    train.py --corpus FILE --out RUN [--recipe recipes/shakespeare.json] [--set section.field=value ...]

RUN holds tokenizer.json, checkpoint.pt (everything needed to go on; a run that finds one goes on from it),
best.pt (the weights with the lowest validation loss so far: the live ones or one of their moving averages),
log.txt and result.json. Batches depend on seed and step alone, so an interrupted run sees the same text as one that
was not.
"""
import argparse
import dataclasses
import json
import math
import os
import time

import torch
import torch.nn.functional as F

from data import Corpus, sample_batch
from evaluate import balance_report, token_losses
from model import DeepseekV2, ModelConfig, Regularisation, balance_factors, count_parameters
from tokenizer import Tokenizer
from tokenizer import train as train_tokenizer


@dataclasses.dataclass
class TrainConfig:
    steps: int = 2000
    seed: int = 1
    batch_tokens: int = 16384
    window: int = 512
    long_window: int = 4096       # every long_every-th batch; so that positions up to the declared maximum are trained
    long_every: int = 8
    learning_rate: float = 2e-3
    final_share: float = 0.02     # of the learning rate, at the end of the cosine
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    clip: float = 1.0
    bpe_dropout: float = 0.1
    dropped_share: float = 0.75   # of the sequences that are re-cut with BPE-dropout ...
    dropped_until: float = 0.7    # ... until this part of the run; the rest learns the cut that serving uses
    alpha_expert: float = 0.003
    alpha_device: float = 0.05
    alpha_communication: float = 0.02
    ema: tuple = (0.99, 0.998)
    eval_every: int = 100
    eval_window: int = 512
    eval_stride: int = 256
    save_every: int = 500
    compile: bool = True
    threads: int = 2


def read_recipe(path, overrides):
    """(ModelConfig, Regularisation, TrainConfig) of a JSON file and of section.field=value settings over it."""
    recipe = {"model": {}, "regularisation": {}, "train": {}}
    if path:
        with open(path) as f:
            recipe.update(json.load(f))
    for setting in overrides:
        name, _, value = setting.partition("=")
        section, _, field = name.partition(".")
        try:
            recipe[section][field] = json.loads(value)
        except json.JSONDecodeError:
            recipe[section][field] = value
    train = TrainConfig(**recipe["train"])
    train.ema = tuple(train.ema)
    return ModelConfig(**recipe["model"]), Regularisation(**recipe["regularisation"]), train


def learning_rate(step, c):
    """Linear warm-up, then half a cosine down to final_share."""
    if step < c.warmup:
        return c.learning_rate * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - c.warmup)
    cosine = 0.5 * (1 + math.cos(progress * math.pi))
    return c.learning_rate * (c.final_share + (1 - c.final_share) * cosine)


def make_optimizer(model, c):
    # Norm weights are scales around one: pulling them to zero is not regularisation.
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    fused = {"fused": True} if next(model.parameters()).is_cuda else {}
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(0.9, c.beta2), **fused)


class MovingAverages:
    """Averages of the weights over the last ~1/(1-decay) steps; at this scale they beat the live weights."""

    def __init__(self, model, decays):
        self.live = list(model.parameters())
        self.averages = {d: [p.detach().clone() for p in self.live] for d in decays}

    @torch.no_grad()
    def update(self, step):
        for decay, average in self.averages.items():
            weight = 1.0 - min(decay, (1 + step) / (10 + step))  # young averages forget their start faster
            torch._foreach_mul_(average, 1.0 - weight)
            torch._foreach_add_(average, [p.detach() for p in self.live], alpha=weight)

    @torch.no_grad()
    def swap(self, decay):
        """Exchanges the live weights with an average's; call again to undo."""
        for p, a in zip(self.live, self.averages[decay]):
            p.data, a.data = a.data, p.data


class Run:
    def __init__(self, arguments):
        self.model_config, self.regularisation, self.c = read_recipe(arguments.recipe, arguments.set)
        self.out, self.stop_after = arguments.out, arguments.stop_after
        os.makedirs(self.out, exist_ok=True)
        torch.set_num_threads(self.c.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with open(arguments.corpus, encoding="utf-8") as f:
            text = f.read()
        if os.path.exists(os.path.join(self.out, "tokenizer.json")):
            self.tokenizer = Tokenizer.load(self.out)
        else:  # from the training part only: the validation text must stay unseen in every way
            self.tokenizer = train_tokenizer(text[:int(len(text) * 0.9)], self.model_config.vocab_size)
            self.tokenizer.save(self.out)
        self.corpus = Corpus(text, self.tokenizer, self.c.bpe_dropout, seed=self.c.seed)
        torch.manual_seed(self.c.seed)
        self.model = DeepseekV2(self.model_config, self.regularisation).to(self.device)
        self.optimizer = make_optimizer(self.model, self.c)
        self.averages = MovingAverages(self.model, self.c.ema)
        if self.c.compile and self.device.type == "cuda":
            self.model.compile_activation()
        self.step, self.seconds, self.best, self.history, self.balance = 0, 0.0, None, [], None
        self.epoch_number, self.streams = None, None
        self.log_file = open(os.path.join(self.out, "log.txt"), "a")

    def log(self, text):
        print(text, flush=True)
        self.log_file.write(text + "\n")
        self.log_file.flush()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def batch(self):
        c, seed = self.c, self.c.seed * 1_000_003 + self.step
        torch.manual_seed(seed)  # dropout too depends on the step alone
        generator = torch.Generator(self.device).manual_seed(seed)
        epoch = self.step * c.batch_tokens // self.corpus.epoch_tokens
        if epoch != self.epoch_number:
            self.epoch_number, self.streams = epoch, self.corpus.epoch(epoch, self.device)
        is_long = c.long_every > 0 and self.step % c.long_every == c.long_every - 1
        window = c.long_window if is_long else c.window
        share = c.dropped_share if self.step < c.dropped_until * c.steps else 0.0
        return sample_batch(self.streams, self.tokenizer.bos_id, max(1, c.batch_tokens // window), window, generator,
                            share)

    def train_step(self):
        """One update; returns what the progress line shows, still on the device."""
        c = self.c
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, c)
        inputs, targets = self.batch()
        self.model.train()
        with self.autocast():
            logits, routings = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        factors = torch.stack([torch.stack(balance_factors(r, self.model_config)) for r in routings])
        alphas = torch.tensor([c.alpha_expert, c.alpha_device, c.alpha_communication], device=self.device)
        (loss + (factors.sum(0) * alphas).sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.step)
        self.step += 1
        return torch.cat([loss.detach()[None], factors.detach().mean(0),
                          torch.stack([r.dropped for r in routings]).mean()[None]])

    def validation(self):
        with self.autocast():
            losses, totals = token_losses(self.model, self.corpus.valid_ids, self.tokenizer.bos_id, self.c.eval_window,
                                          self.c.eval_stride, with_routing=True)
        return float(losses.double().sum() / len(self.corpus.valid_text)), totals

    def evaluate(self):
        """Validation loss of the live weights and of each average; the best of all is kept."""
        losses = {}
        for which in ("live", *self.c.ema):
            if which != "live":
                self.averages.swap(which)
            losses[str(which)], totals = self.validation()
            if which == "live":
                self.balance = balance_report(totals, self.model_config)
            if self.best is None or losses[str(which)] < self.best["loss"]:
                self.best = {"loss": losses[str(which)], "step": self.step, "which": f"average {which}",
                             "balance": balance_report(totals, self.model_config),
                             "model_config": dataclasses.asdict(self.model_config),
                             "weights": {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}}
                if which == "live":
                    self.best["which"] = "live weights"
            if which != "live":
                self.averages.swap(which)
        self.history.append({"step": self.step, **losses})
        return losses

    def save(self):
        """checkpoint.pt and best.pt, each replaced in one go so that a cut never leaves half a file."""
        state = {"step": self.step, "seconds": self.seconds, "history": self.history, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "averages": self.averages.averages}
        for name, value in (("best.pt", self.best), ("checkpoint.pt", state)):
            path = os.path.join(self.out, name)
            torch.save(value, path + ".part")
            os.replace(path + ".part", path)

    def resume(self):
        path = os.path.join(self.out, "checkpoint.pt")
        if not os.path.exists(path):
            return
        options = {} if torch.__version__.startswith("1.") else {"weights_only": False}
        state = torch.load(path, map_location=self.device, **options)
        self.best = torch.load(os.path.join(self.out, "best.pt"), map_location="cpu", **options)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for decay, average in state["averages"].items():
            for mine, theirs in zip(self.averages.averages[decay], average):
                mine.copy_(theirs)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.log(f"goes on from step {self.step}")

    def run(self):
        c = self.c
        self.resume()
        self.log(f"{count_parameters(self.model_config) / 1e6:.2f} M parameters, {self.corpus.epoch_tokens} training "
                 f"tokens, {len(self.corpus.train_text) / self.corpus.epoch_tokens:.3f} characters per token, "
                 f"{self.device}")
        began, last, shown, count = time.time(), time.time(), 0, 0
        while self.step < c.steps:
            shown = shown + self.train_step()
            count += 1
            at_end = self.step == c.steps or (self.stop_after and time.time() - began > self.stop_after)
            if self.step % c.eval_every == 0 or at_end:
                loss, expert, device, communication, dropped = (shown / count).tolist()
                rate = count * c.batch_tokens / (time.time() - last)
                losses = self.evaluate()
                self.seconds += time.time() - last
                self.log(f"step {self.step}/{c.steps} loss {loss:.3f} nats/token, {rate / 1e3:.0f}K tokens/s, "
                         f"B_exp {expert:.3f} B_dev {device:.3f} B_comm {communication:.3f}, dropped {dropped:.1%}, "
                         f"validation " + " ".join(f"{k} {v:.4f}" for k, v in losses.items()))
                last, shown, count = time.time(), 0, 0
            if self.step % c.save_every == 0 or at_end:
                self.save()
                last = time.time()
            if at_end:
                break
        self.report()

    def report(self):
        """result.json: what was run, on what, and what came out."""
        summary = {"steps": self.step, "tokens": self.step * self.c.batch_tokens, "seconds": round(self.seconds, 1),
                   "parameters": count_parameters(self.model_config), "history": self.history,
                   "characters_per_token": len(self.corpus.train_text) / self.corpus.epoch_tokens,
                   "kv_bytes_per_token": self.model_config.kv_bytes_per_token(),
                   "best": {k: v for k, v in self.best.items() if k not in ("weights", "model_config")},
                   "final_balance": self.balance,
                   "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
                   "torch": torch.__version__, "model": dataclasses.asdict(self.model_config),
                   "regularisation": dataclasses.asdict(self.regularisation), "train": dataclasses.asdict(self.c)}
        with open(os.path.join(self.out, "result.json"), "w") as f:
            json.dump(summary, f, indent=1)
        self.log(f"best: {self.best['loss']:.4f} nats per character at step {self.best['step']}, {self.best['which']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe", help="JSON: {model: {...}, regularisation: {...}, train: {...}}")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--stop-after", type=float, help="seconds; the run saves and can go on later")
    Run(parser.parse_args()).run()


if __name__ == "__main__":
    main()
