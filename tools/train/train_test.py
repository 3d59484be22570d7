"""Checks of the training code that need no GPU and no corpus:  python3 train_test.py"""
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import torch

import export
import model as models
from data import Corpus, sample_batch
from tokenizer import Tokenizer
from tokenizer import train as train_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TEXT = "".join(f"KING {name}:\nWhat say you of the {noun}, my lord? I'll have none on't.\n\n" for name in
               ("HENRY", "JOHN", "LEAR", "RICHARD") for noun in ("crown", "battle", "queen", "winter", "sea")) * 6
TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=8, num_hidden_layers=3,
            num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, max_position_embeddings=128)


class TokenizerTest(unittest.TestCase):
    def setUp(self):
        self.tokenizer = train_tokenizer(TEXT, 300)

    def test_any_text_comes_back(self):
        for text in (TEXT, "", "  two  spaces ", "tab\t\r\n\n", "naïve 日本語 𝄞 3.14", "\x00\x7f"):
            self.assertEqual(self.tokenizer.decode(self.tokenizer.encode(text)), text)

    def test_files_come_back(self):
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(folder)
            self.assertEqual(Tokenizer.load(folder).encode(TEXT), self.tokenizer.encode(TEXT))

    def test_dropout_changes_the_cut_and_not_the_text(self):
        draw = np.random.default_rng(0).random
        cuts = {tuple(self.tokenizer.segment("RICHARD", 0.3, draw)) for _ in range(50)}
        self.assertGreater(len(cuts), 1)
        for cut in cuts:
            self.assertEqual(self.tokenizer.decode(cut), "RICHARD")

    def test_agrees_with_the_tokenizers_package(self):
        try:
            import tokenizers
        except ImportError:
            self.skipTest("tokenizers is not installed")
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(folder)
            theirs = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        for text in (TEXT, "naïve 日本語  3.14\r\n x"):
            self.assertEqual(theirs.encode(text, add_special_tokens=False).ids, self.tokenizer.encode(text))


class CorpusTest(unittest.TestCase):
    def setUp(self):
        self.tokenizer = train_tokenizer(TEXT, 300)
        self.corpus = Corpus(TEXT, self.tokenizer, bpe_dropout=0.2, variants=4)

    def test_every_stream_spells_the_training_text(self):
        for ids, _ in self.corpus.epoch(3, "cpu"):
            self.assertEqual(self.tokenizer.decode(ids.tolist()), self.corpus.train_text)

    def test_epochs_repeat_exactly(self):
        again = self.corpus.epoch(3, "cpu")
        for (a, _), (b, _) in zip(self.corpus.epoch(3, "cpu"), again):
            self.assertTrue(torch.equal(a, b))
        self.assertFalse(torch.equal(self.corpus.epoch(4, "cpu")[1][0], again[1][0]))

    def test_speeches_begin_with_a_name(self):
        for ids, speech in self.corpus.epoch(0, "cpu"):
            self.assertGreater(len(speech), 100)
            for begin in speech[:-1].tolist():  # the last may be cut by the split
                self.assertTrue(self.tokenizer.decode(ids[begin:begin + 8].tolist()).startswith("KING"))

    def test_targets_follow_inputs(self):
        generator = torch.Generator().manual_seed(0)
        inputs, targets = sample_batch(self.corpus.epoch(0, "cpu"), self.tokenizer.bos_id, 8, 32, generator, 0.5)
        self.assertTrue(torch.equal(inputs[:, 1:], targets[:, :-1]))
        self.assertTrue((inputs[0::2, 0] == self.tokenizer.bos_id).all())


class RoutingTest(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.config = models.ModelConfig(**TINY)
        self.scores = torch.randn(64, 160).mul(2).softmax(-1)

    def test_choice_is_that_of_the_definition(self):
        ids = models.choose_experts(self.scores, self.config)
        for row, chosen in zip(self.scores.tolist(), ids.tolist()):
            groups = sorted(range(8), key=lambda g: -max(row[g * 20:g * 20 + 20]))[:3]
            best = sorted((e for e in range(160) if e // 20 in groups), key=lambda e: -row[e])[:6]
            self.assertEqual(set(chosen), set(best))

    def test_underflow_does_not_leave_the_groups(self):
        scores = torch.zeros(1, 160)
        scores[0, 150] = 1.0
        self.assertLessEqual(len({e // 20 for e in models.choose_experts(scores, self.config)[0].tolist()}), 3)

    def test_dropping_keeps_the_budget_the_best_and_the_exempt(self):
        device, affinity = torch.randint(0, 3, (64, 6)), torch.rand(64, 6)
        exempt = torch.arange(64) < 6
        keep = models.within_budget(device, affinity, exempt, 8, 1.0)
        self.assertTrue(keep[exempt].all())
        budget = 64 * 6 // 8
        for d in range(3):
            on = device == d
            self.assertEqual(int((keep & on).sum()), max(budget, int((on & exempt[:, None]).sum())))
            ours = on & ~exempt[:, None]
            self.assertGreater(affinity[ours & keep].min(), affinity[ours & ~keep].max())

    def test_even_routing_has_factors_of_one(self):
        tokens = 160
        chosen = torch.full((1, 160), 6.0)
        probability = torch.full((1, 160), 1 / 160)
        sent = torch.full((1, 8), tokens * 3 / 8)  # three devices for every token: F = M
        routing = models.LayerRouting(tokens, chosen, probability, sent, None)
        for factor in models.balance_factors(routing, self.config):
            self.assertAlmostEqual(float(factor), 1.0, places=5)

    def test_six_experts_for_all_is_the_worst_case(self):
        chosen, probability = torch.zeros(1, 160), torch.zeros(1, 160)
        chosen[0, :6], probability[0, :6] = 10, 1 / 6
        sent = torch.zeros(1, 8)
        sent[0, 0] = 10
        expert, device, _ = models.balance_factors(models.LayerRouting(10, chosen, probability, sent, None), self.config)
        self.assertAlmostEqual(float(expert), 160 / 6, places=4)
        self.assertAlmostEqual(float(device), 8.0, places=4)


class ModelTest(unittest.TestCase):
    def test_pairs_are_adjacent(self):
        x = torch.randn(1, 5, 2, 8)
        angle = torch.rand(5, 4)
        turned = models.rotate_pairs(x, angle.cos(), angle.sin())
        z = torch.view_as_complex(x.reshape(1, 5, 2, 4, 2)) * torch.polar(torch.ones(5, 4), angle)[:, None]
        self.assertTrue(torch.allclose(turned, torch.view_as_real(z).flatten(-2), atol=1e-6))

    def test_the_future_is_not_seen(self):
        for attention in ("mla", "mha", "gqa", "mqa"):
            torch.manual_seed(0)
            config = models.ModelConfig(**TINY, attention=attention, num_key_value_heads=1)
            model = models.DeepseekV2(config).eval()
            a = torch.randint(0, 256, (1, 12))
            b = a.clone()
            b[0, 8:] = 7
            with torch.no_grad():
                self.assertTrue(torch.allclose(model(a)[0][:, :8], model(b)[0][:, :8], atol=1e-5))

    def test_gradients_reach_every_parameter(self):
        torch.manual_seed(0)
        model = models.DeepseekV2(models.ModelConfig(**TINY), models.Regularisation(0.1, 0.1, 1.0))
        logits, routings = model(torch.randint(0, 256, (4, 128)))
        (logits.pow(2).mean() + sum(sum(models.balance_factors(r, model.config)) for r in routings)).backward()
        for name, p in model.named_parameters():
            self.assertGreater(float(p.grad.abs().sum()), 0, name)

    def test_export_comes_back(self):
        for q_lora_rank in (16, None):
            torch.manual_seed(0)
            config = models.ModelConfig(**dict(TINY, q_lora_rank=q_lora_rank))
            model = models.DeepseekV2(config).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.to(torch.bfloat16).float())
            ids = torch.randint(0, 256, (1, 20))
            with tempfile.TemporaryDirectory() as folder:
                export.export(model.state_dict(), config, train_tokenizer(TEXT, 300), folder)
                again, _ = export.load_checkpoint(folder)
                self.assertEqual(dataclasses.asdict(again.config), dict(dataclasses.asdict(config)))
                with torch.no_grad():
                    self.assertTrue(torch.equal(again(ids)[0], model(ids)[0]))


class TrainTest(unittest.TestCase):
    def test_an_interrupted_run_ends_like_a_whole_one(self):
        settings = [f"model.{k}={v}" for k, v in TINY.items()] + [
            "train.batch_tokens=256", "train.window=64", "train.long_window=128", "train.long_every=3",
            "train.eval_every=2", "train.save_every=2", "train.compile=false", "train.eval_window=64",
            "train.eval_stride=64", "train.warmup=2", "regularisation.dropout=0.1", "regularisation.capacity_factor=1"]
        with tempfile.TemporaryDirectory() as folder:
            corpus = os.path.join(folder, "corpus.txt")
            with open(corpus, "w") as f:
                f.write(TEXT)

            def run(name, *more):
                command = [sys.executable, os.path.join(HERE, "train.py"), "--corpus", corpus, "--out",
                           os.path.join(folder, name)]
                for s in settings + ["train.steps=6"]:
                    command += ["--set", s]
                subprocess.run(command + list(more), check=True, stdout=subprocess.DEVNULL)
                with open(os.path.join(folder, name, "result.json")) as f:
                    return json.load(f)

            whole = run("whole")
            cut = run("cut", "--stop-after", "0.000001")
            self.assertLess(cut["steps"], 6)
            for _ in range(5):
                again = run("cut", "--stop-after", "0.000001")
            self.assertEqual(again["steps"], 6)
            for key in ("live", "0.99"):
                self.assertAlmostEqual(whole["history"][-1][key], again["history"][-1][key], places=4)


if __name__ == "__main__":
    unittest.main()
