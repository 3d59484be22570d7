"""minke on a GPU against minke on CPUs, as a client sees them: `serve --device=cuda` (whole steps, graphs) and `up` with an
attention node on the GPU. Exit code 77: no GPU here, or a build without CUDA; nothing was tested."""
import json, os, subprocess, sys, threading, unittest
from unittest import mock

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))
import harness

MODEL = os.path.join(harness.ROOT, "models", "minke-shakespeare")
PROMPTS = ["ROMEO:\n", "To be, or not to be", "JULIET:\nO Romeo, ", "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 12]


def generate(cluster, prompt, **more):
    request = dict(prompt=prompt, max_tokens=48, temperature=0, return_token_ids=True, ignore_eos=True)
    return cluster.complete(**{**request, **more})["choices"][0]


def scores(cluster, prompt):
    """Log-probabilities of a text's own tokens."""
    return cluster.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"][1:]


class Gpu(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with harness.Cluster(MODEL, "--device=cpu", verb="serve") as cpu:
            cls.want = [generate(cpu, p) for p in PROMPTS]
            cls.texts = [p + w["text"] for p, w in zip(PROMPTS, cls.want)]
            cls.want_scores = [scores(cpu, t) for t in cls.texts]

    def agrees(self, cluster):
        for text, want in zip(self.texts, self.want_scores):
            got = scores(cluster, text)
            self.assertEqual(len(got), len(want))
            off = sorted(abs(a - b) for a, b in zip(got, want))
            self.assertLess(off[len(off) // 2], 0.02, "median difference of log-probabilities")
            self.assertLess(off[-1], 0.5)
        same = sum(generate(cluster, p)["token_ids"][:16] == w["token_ids"][:16] for p, w in zip(PROMPTS, self.want))
        self.assertGreaterEqual(same, len(PROMPTS) - 1, "greedy beginnings; one may have met a near-tie")

    def test_serve_computes_whole_steps(self):
        with harness.Cluster(MODEL, "--device=cuda", verb="serve") as gpu:
            self.assertIn("computing on", gpu.log())
            self.assertNotIn("[experts]", gpu.log())
            self.agrees(gpu)
            sampled = dict(temperature=0.8, top_p=0.9, seed=7)
            alone = [generate(gpu, p, **sampled)["token_ids"] for p in PROMPTS]
            self.assertEqual(alone, [generate(gpu, p, **sampled)["token_ids"] for p in PROMPTS])
            # What the host draws: penalties, biases, log-probabilities.
            banned = alone[0][0]
            biased = generate(gpu, PROMPTS[0], logit_bias={str(banned): -100}, frequency_penalty=0.5, logprobs=2)
            self.assertNotIn(banned, biased["token_ids"])
            self.assertEqual(len(biased["logprobs"]["token_logprobs"]), 48)
            # Many at once, of every length.
            answers = {}
            threads = [threading.Thread(target=lambda i=i: answers.__setitem__(i, generate(gpu, PROMPTS[i % 4], max_tokens=8 + i)))
                       for i in range(40)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            self.assertEqual({i: len(a["token_ids"]) for i, a in answers.items()}, {i: 8 + i for i in range(40)})

    def test_serve_with_fp8_experts(self):
        """Weights of half the bytes: another text is right too, but the scores of a given one stay near."""
        with harness.Cluster(MODEL, "--device=cuda", "--experts-format=fp8", verb="serve") as gpu:
            for text, want in zip(self.texts, self.want_scores):
                off = sorted(abs(a - b) for a, b in zip(scores(gpu, text), want))
                self.assertLess(off[len(off) // 2], 0.1, "median difference of log-probabilities")
            self.assertEqual(len(generate(gpu, PROMPTS[0])["token_ids"]), 48)

    def test_cluster_with_attention_on_the_gpu(self):
        for flags in (["--microbatches", "1"], ["--microbatches", "2", "--routing", "local"]):
            with harness.Cluster(MODEL, "--device=cuda", "--experts", "2", *flags) as gpu:
                self.agrees(gpu)

    def test_rows_stay_in_gpu_memory(self):
        """Attention node, router and expert servers in processes of their own, over a UCX that knows CUDA (docs/gpu.md)."""
        for flags in (["--microbatches", "1"], ["--microbatches", "2", "--routing", "local"]):
            with harness.Cluster(MODEL, "--device=cuda", "--experts", "2", *flags) as gpu:
                staged = [l for l in gpu.log().splitlines() if "rows=staged" in l]
                if staged:
                    self.skipTest("rows do not stay in GPU memory here: " + staged[0])
                self.assertEqual(gpu.log().count("rows=gpu"), 4, "attention node, router, two expert servers")
                self.agrees(gpu)
                for role in ("attention", "expert") if "local" in flags else ("attention", "router", "expert"):
                    frames = {"gpu": 0, "host": 0}
                    for (name, values), count in gpu.metrics(role, labels=True).items():
                        if name == "minke:ucx_row_frames_total":
                            frames["gpu" if "gpu" in values.split(",") else "host"] += count
                    self.assertGreater(frames["gpu"], 100, role)
                    # Descriptors of a prompt's hundreds of rows (192 wide here) do not fit UCX's header.
                    self.assertLess(frames["host"], frames["gpu"] / 10, role)
            with mock.patch.dict(os.environ, UCX_TLS="posix,sysv,tcp,self"):
                with harness.Cluster(MODEL, "--device=cuda", "--experts", "2", *flags) as without:
                    self.assertNotIn("rows=gpu", without.log())
                    self.assertIn("rows=staged", without.log())
                    self.agrees(without)

    def test_what_a_gpu_does_not_do(self):
        for flags, expect in ((["--precision=exact"], "--device"), (["--mla=naive"], "--mla")):
            result = harness.run("serve", MODEL, "--device=cuda", "--port", "0", *flags)
            self.assertGreater(result.returncode, 0)
            self.assertIn(expect, [l for l in result.stderr.splitlines() if l.startswith("minke")][-1])


if __name__ == "__main__":
    probe = harness.run("serve", "/nowhere", "--device=cuda")
    if "--device" in probe.stderr:
        print("tests/gpu/serve_e2e.py: " + probe.stderr.strip() + " Nothing was tested.")
        sys.exit(77)
    harness.main()
