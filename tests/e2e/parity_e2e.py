"""The oracle's numbers through the real gateway, router, attention node and expert servers over UCX."""
import math, unittest
import harness
from harness import Cluster, checkpoint, golden


def score(cluster, ids):
    answer = cluster.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0)
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    return logprobs[1:]


def relative(got, want):
    assert len(got) == len(want), (len(got), len(want))
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(got, want)) / sum(b * b for b in want))


class Parity(unittest.TestCase):
    def check(self, name):
        g = golden(name)
        with Cluster(checkpoint(name), "--precision", "exact") as cluster:
            self.assertLess(relative(score(cluster, g["input_ids"]), g["token_logprobs"]), 1e-4)
            answer = cluster.complete(prompt=g["greedy_prompt"], max_tokens=len(g["greedy_ids"]), temperature=0,
                                      return_token_ids=True, ignore_eos=True)
            for got, want, gap in zip(answer["choices"][0]["token_ids"], g["greedy_ids"], g["greedy_gaps"]):
                if gap < 0.002:
                    break
                self.assertEqual(got, want)
        with Cluster(checkpoint(name)) as cluster:
            got = score(cluster, g["input_ids"])
            errors = sorted(abs(a - b) / abs(b) for a, b in zip(got, g["token_logprobs"]))
            self.assertLessEqual(errors[len(errors) // 2], 1e-2)
            self.assertLessEqual(errors[len(errors) * 9 // 10], 3e-2)

    def test_v2(self):
        self.check("v2")

    def test_lite(self):
        self.check("lite")

    def test_plain_rope_and_six_groups(self):
        self.check("plain")

    def test_unequal_mscales_and_tied_embeddings(self):
        self.check("mscale")

    def test_same_bits_on_any_cluster(self):
        g = golden("v2")
        path = checkpoint("v2")
        request = dict(prompt=g["input_ids"], max_tokens=8, temperature=0, echo=True, logprobs=3, return_token_ids=True)
        want = None
        shapes = [(["--experts", str(n), "--routing", r, "--microbatches", m], "up")
                  for n, r, m in [(1, "remote", "1"), (2, "local", "2"), (4, "remote", "2"), (8, "local", "1"), (8, "remote", "1")]]
        for flags, verb in shapes + [(["--routing", "local"], "serve"), (["--microbatches", "2"], "serve"),
                                     (["--experts=3", "--replicas=2", "--transport=tcp"], "up")]:
            with Cluster(path, "--precision=exact", *flags, verb=verb) as cluster:
                choice = cluster.complete(**request)["choices"][0]
                bits = (choice["token_ids"], choice["logprobs"])
                want = want or bits
                self.assertEqual(bits, want, flags)


if __name__ == "__main__":
    harness.main()
