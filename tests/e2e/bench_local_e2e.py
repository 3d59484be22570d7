"""`minke bench kernels` and `minke bench transport`: what they print, and what they say when they cannot. How fast this machine is
matters to no test: bounds are those of numbers that mean something at all."""
import json, os, re, shutil, stat, subprocess, tempfile, unittest
from unittest import mock

import harness
from harness import MINKE, run


def bench(verb, *flags, timeout=300, **more):
    """Runs it with its JSON on standard output; the parsed JSON and the table."""
    r = subprocess.run([MINKE, "bench", verb, "--json", "-", *flags], capture_output=True, text=True, timeout=timeout, **more)
    if r.returncode != 0:
        raise AssertionError("exit code %d:\n%s%s" % (r.returncode, r.stdout, r.stderr))
    return json.loads(r.stdout), r.stderr


class Mistakes(unittest.TestCase):
    def check(self, verb, cases):
        for flags, says in cases:
            r = run("bench", verb, *flags)
            self.assertIn(r.returncode, (1, 2), flags)
            self.assertEqual(r.stdout, "", flags)
            self.assertRegex(r.stderr, r"\Aminke: [^\n]+\n\Z", flags)
            self.assertIn(says, r.stderr, flags)

    def test_get_one_line(self):
        folder = os.path.join(harness._scratch, "missing")
        self.check("kernels", ((["--filter", "["], "--filter"), (["--filter", "NoSuchKernel"], "--filter"), (["--min-time", "0"], "--min-time"),
                               (["--min-time", "x"], "--min-time"), (["--threads", "-1"], "--threads"), (["--isa", "sse"], "--isa"),
                               (["--json", folder + "/x.json"], "--json"), (["--nonsense"], "nonsense"), (["extra"], "extra")))
        self.check("transport", ((["--sizes", "x"], "--sizes"), (["--sizes", "64,"], "--sizes"), (["--sizes", "0"], "--sizes"),
                                 (["--sizes", "-1"], "--sizes"), (["--sizes", "257k"], "--sizes"), (["--sizes", "4294967297"], "--sizes"),
                                 (["--transport", "x"], "--transport"), (["--interface", "nosuch0"], "nosuch0"), (["--poll", "x"], "--poll"),
                                 (["--min-time", "-1"], "--min-time"), (["--json", folder + "/x.json"], "--json"), (["--nonsense"], "nonsense")))

    def test_an_instruction_set_this_cpu_has_not(self):
        with open("/proc/cpuinfo") as f:
            if "avx512_bf16" in f.read():
                self.skipTest("this CPU has them all")
        self.check("kernels", ((["--isa", "avx512bf16"], "--isa"),))


class Kernels(unittest.TestCase):
    def sane(self, *flags):
        """Shares depend on what else this machine does meanwhile: one of a few runs is undisturbed."""
        for _ in range(5):
            result, table = bench("kernels", *flags)
            shares = {b["name"].split("/real_time")[0]: b["share"] for b in result["benchmarks"]}
            if all(0 < s <= 1.5 for s in shares.values()):
                return result, table
        self.fail(shares)

    def test_shares_of_ceilings(self):
        names = ["ReadBandwidth", "FlopsF32", "MatMulBf16/4/1024/384", "MatMulExact/4/1024/384", "MlaDecode/heads:16/batch:8/depth:128",
                 "RmsNormToBf16/64/5120", "Rope/64/heads:16", "Gate/64/5120/160"]
        result, table = self.sane("--min-time", "0.02", "--filter", "^(%s)$" % "|".join(names))
        context = result["context"]
        c = context["ceilings"]
        self.assertGreater(c["read_bytes_per_second"], 0)
        self.assertEqual(c["read_bytes_per_second"], max(c["read_patterns_bytes_per_second"].values()))
        self.assertGreater(c["f32_flops_per_second"], 0)
        self.assertGreater(c["bf16_flops_per_second"], 0)
        self.assertEqual(context["threads"], os.cpu_count())
        rows = {b["name"].split("/real_time")[0]: b for b in result["benchmarks"]}
        self.assertEqual(list(rows), names)
        for name, b in rows.items():
            seconds = b["real_time"] * 1e-6
            self.assertEqual(b["time_unit"], "us")
            self.assertIn(b["label"], ("memory", "compute"))
            self.assertAlmostEqual(b["bytes_per_second"] * seconds, b["bytes"], delta=1e-3 * b["bytes"])
            self.assertAlmostEqual(b["GFLOP/s"] * 1e9 * seconds, b["flops"], delta=1e-3 * b["flops"])
            predicted = max(b["bytes"] / b["ceiling_bytes_per_second"], b["flops"] / (b["ceiling_GFLOP/s"] * 1e9))
            self.assertAlmostEqual(b["share"] * seconds, predicted, delta=1e-3 * predicted)
            self.assertRegex(table, r"(?m)^%s +[\d.]+ (us|ms|s) +[-\d.]+ +[-\d.]+ +\d+ %%  (memory|compute), [\d.]+ G" % re.escape(name))
        self.assertEqual(rows["ReadBandwidth"]["label"], "memory")
        self.assertEqual(rows["MatMulBf16/4/1024/384"]["bytes"], 1024 * 384 * 2)
        self.assertEqual(rows["MatMulExact/4/1024/384"]["flops"], 2 * 4 * 1024 * 384)
        self.assertLessEqual(max(len(line) for line in table.splitlines()), 120)

    def test_portable_on_one_thread_and_json_in_a_file(self):
        path = os.path.join(harness._scratch, "kernels.json")
        r = run("bench", "kernels", "--isa", "portable", "--threads", "1", "--min-time", "0.01", "--filter", "MatMulBf16/1/1024/384", "--json", path)
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertIn("MatMulBf16/1/1024/384 ", r.stdout)
        self.assertIn("widened to f32", r.stdout)
        with open(path) as f:
            context = json.load(f)["context"]
        self.assertEqual((context["isa"], context["threads"], context["ceilings"]["bf16_dot"]), ("portable", 1, False))


class Transport(unittest.TestCase):
    def check(self, result, sizes, lanes, raw):
        rows = result["results"]
        self.assertEqual([(r["transport"], r["payload_bytes"]) for r in rows], [(t, s) for t in ("ucx", "inproc") for s in sizes])
        for r in rows:
            self.assertGreater(r["round_trip_us"]["count"], 0)
            self.assertTrue(0 < r["round_trip_us"]["p50"] <= r["round_trip_us"]["p99"], r)
            self.assertGreater(r["dispatch_bytes_per_s"], 0)
            self.assertGreater(r["partial_bytes_per_s"], 0)
            self.assertEqual(r["lanes"], lanes if r["transport"] == "ucx" else "inproc")
            if r["transport"] == "ucx" and raw:
                self.assertGreater(r["ucx_perftest"]["round_trip_us"]["p50"], 0)
                self.assertGreater(r["ucx_perftest"]["bytes_per_s"], 0)
            else:
                self.assertIsNone(r["ucx_perftest"])

    def test_what_ucx_says_is_not_in_the_json(self):
        with mock.patch.dict(os.environ, UCX_LOG_LEVEL="info"):
            result, table = bench("transport", "--min-time", "0.01", "--sizes", "64")
        self.assertEqual([r["payload_bytes"] for r in result["results"] if r["transport"] == "ucx"], [64])
        self.assertIn("UCX", table)

    def test_sizes_and_selections(self):
        has_perftest = shutil.which("ucx_perftest") is not None
        for transport, lanes in (("auto", "posix"), ("tcp", "tcp")):
            result, table = bench("transport", "--transport", transport, "--min-time", "0.02", "--sizes", "64,256k")
            self.check(result, [64, 262144], lanes, has_perftest)
            self.assertEqual(result["no_ucx_perftest"] is None, has_perftest)
            self.assertLessEqual(max(len(line) for line in table.splitlines()), 120)

    def test_without_ucx_perftest(self):
        with tempfile.TemporaryDirectory() as empty:
            result, table = bench("transport", "--min-time", "0.01", "--sizes", "1,10k", env=dict(os.environ, PATH=empty))
        self.check(result, [1, 10240], "posix", False)
        self.assertIn("not on PATH", result["no_ucx_perftest"])
        self.assertEqual(len(re.findall("ucx_perftest is not on PATH", table)), 1)

    def test_a_ucx_perftest_that_fails_leaves_the_rest(self):
        with tempfile.TemporaryDirectory() as folder:
            fake = os.path.join(folder, "ucx_perftest")
            with open(fake, "w") as f:
                f.write("#!/bin/sh\necho broken >&2\nexit 3\n")
            os.chmod(fake, stat.S_IRWXU)
            result, table = bench("transport", "--min-time", "0.01", "--sizes", "64", env=dict(os.environ, PATH=folder))
        self.check(result, [64], "posix", False)
        self.assertIn("ucx_perftest", result["results"][0]["ucx_perftest_error"])


if __name__ == "__main__":
    harness.main()
