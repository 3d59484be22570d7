#!/usr/bin/env python3
"""`minke plan`: its two forms, JSON, and one line for every wrong flag or file."""
import json, os, shutil, tempfile, unittest

import harness


class Plan(unittest.TestCase):
    def refused(self, *arguments, code, contains):
        result = harness.run("plan", *arguments)
        self.assertEqual(result.returncode, code, result.stderr + result.stdout)
        self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        for text in contains:
            self.assertIn(text, result.stderr)
        self.assertEqual(result.stdout, "")

    def test_table_and_json_agree(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "plan.json")
            result = harness.run("plan", "--tpot-ms", "200", "--nodes-max", "16", "--json", path)
            self.assertEqual(result.returncode, 0, result.stderr)
            with open(path) as f:
                plan = json.load(f)
        self.assertIn("minke up CHECKPOINT " + plan["up_flags"], result.stdout)
        self.assertLessEqual(plan["plan"]["step_s"], 0.2)
        self.assertEqual(plan["cost"]["latent_bytes_per_token"], 69120)

    def test_json_alone_on_standard_output(self):
        result = harness.run("plan", "--nodes-max", "8", "--json", "-")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertGreater(json.loads(result.stdout)["plan"]["tokens_per_s"], 0)
        self.assertIn("bottleneck", result.stderr)

    def test_flags_of_up_are_flags_of_up(self):
        """What the plan says to give `minke up` gets past its parser: the checkpoint is what it then misses."""
        plan = json.loads(harness.run("plan", "--nodes-max", "8", "--json", "-").stdout)
        result = harness.run("up", "/nowhere", "--device", "cpu", *plan["up_flags"].replace("--routers 2", "--routers 1").split())
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertIn("/nowhere", result.stderr)

    def test_a_checkpoint_and_measured_ceilings(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(os.path.join(harness.ROOT, "bench", "v2-bench.config.json"), os.path.join(folder, "config.json"))
            ceilings = os.path.join(folder, "kernels.json")
            measured = harness.run("bench", "kernels", "--filter", "GroupedFfn/160x1024x384/[14]$", "--min-time", "0.01", "--json", ceilings)
            self.assertEqual(measured.returncode, 0, measured.stderr)
            result = harness.run("plan", "--checkpoint", folder, "--gpu", "none", "--ceilings", ceilings, "--memory-gb", "16",
                                 "--prompt-tokens", "128", "--output-tokens", "64", "--attention", "1", "--experts", "4",
                                 "--sequences", "32", "--json", "-")
            self.assertEqual(result.returncode, 0, result.stderr)
            plan = json.loads(result.stdout)
        self.assertEqual(plan["plan"]["expert_servers"], 4)
        self.assertEqual(plan["ceilings"]["expert"]["source"], ceilings)

    def test_simulate_still_simulates(self):
        result = harness.run("plan", "--simulate", "--servers", "4", "--intervals", "3", "--model", "v2-lite")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("a plan took", result.stdout)

    def test_flags_that_are_wrong(self):
        self.refused("--model", "v9", code=2, contains=["--model", "v9"])
        self.refused("--gpu", "h900", code=2, contains=["--gpu", "h900"])
        self.refused("--tpot-ms", "fast", code=2, contains=["--tpot-ms", "fast"])
        self.refused("--imbalance", "0.5", code=2, contains=["--imbalance"])
        self.refused("--checkpoint", "/nowhere", code=2, contains=["/nowhere"])
        self.refused("--simulate", "--tpot-ms", "100", code=2, contains=["--simulate", "--tpot-ms"])
        self.refused("--zipf", "1", code=2, contains=["--zipf", "--simulate"])
        self.refused("--context", "4096", "--prompt-tokens", "5", code=2, contains=["--context", "--prompt-tokens"])
        self.refused("--tokens-per-s", "5", "--requests-per-s", "5", code=2, contains=["--requests-per-s"])

    def test_what_does_not_go_together(self):
        self.refused("--context", "4096", "--requests-per-s", "5", code=1, contains=["--requests-per-s", "--context"])
        self.refused("--context", "4096", "--ttft-ms", "5", code=1, contains=["--ttft-ms", "--prompt-tokens"])
        self.refused("--prompt-tokens", "200000", code=1, contains=["163840", "200512"])
        self.refused("--gpu", "none", code=1, contains=["bf16_tflops"])
        self.refused("--replicas", "4", "--experts", "2", code=1, contains=["--replicas", "found 4"])
        self.refused("--json", "/nowhere/plan.json", code=1, contains=["/nowhere/plan.json"])
        self.refused("--ceilings", "/nowhere.json", code=1, contains=["/nowhere.json"])

    def test_files_that_are_wrong(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ceilings.json")
            for text, found in (("{", "JSON object"), ('{"speed": 3}', '"speed"'), ('{"read_gb_s": -3}', "found -3"),
                                ('{"copy_gbps": 3, "rows": 4}', '"rows"')):
                with open(path, "w") as f:
                    f.write(text)
                self.refused("--ceilings", path, code=1, contains=[path, found])
            with open(path, "w") as f:
                f.write('{"bf16_tflops": 1, "read_gb_s": 30, "memory_gb": 900}')
            self.refused("--gpu", "none", "--ceilings", path, "--experts-format", "fp8", code=1, contains=["expert_fp8_tflops"])

    def test_what_cannot_be_is_explained(self):
        self.refused("--tpot-ms", "5", code=1, contains=["--tpot-ms 5", "the least is", "alone too long"])
        self.refused("--gpu", "l40s", "--experts-format", "fp8", "--nodes-max", "2", code=1, contains=["the experts do not fit"])
        self.refused("--memory-gb", "10", code=1, contains=["an attention node is too small"])


if __name__ == "__main__":
    harness.main()
