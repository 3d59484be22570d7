#!/usr/bin/env python3
"""Writes tests/golden/*.json and *.safetensors: what an independent float64 implementation of DeepSeek-V2 says of
checkpoints that `minke checkpoint make` writes (same seed, same bytes on any machine), so that parity tests need
neither Python nor the weights in the repository.

  make_golden.py --oracle deepseek_v2_reference.py --minke build/bin/minke

The oracle is a module with Model.load(dir).forward(ids) -> logits, routing; write_safetensors; f32_to_bf16.
"""
import argparse, importlib.util, json, os, subprocess, sys, tempfile
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", hidden_act="silu", vocab_size=512,
            hidden_size=64, intermediate_size=160, moe_intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, n_shared_experts=2, n_routed_experts=160, routed_scaling_factor=16.0, kv_lora_rank=32,
            q_lora_rank=24, qk_rope_head_dim=16, v_head_dim=16, qk_nope_head_dim=16, n_group=8, topk_group=3,
            num_experts_per_tok=6, first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=False,
            scoring_func="softmax", topk_method="group_limited_greedy", max_position_embeddings=2560, rms_norm_eps=1e-6,
            rope_theta=10000, tie_word_embeddings=False, attention_bias=False, bos_token_id=0, eos_token_id=1)
YARN = dict(type="yarn", factor=40, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=0.707,
            mscale_all_dim=0.707)
SHAPES = {
    # DeepSeek-V2 in small: YaRN, 8 groups of 20, device-limited top-6.
    "v2": dict(rope_scaling=YARN),
    # V2-Lite in small: no query compression, plain top-6 of 64, value width unlike the key's, 3 heads.
    "lite": dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, n_routed_experts=64,
                 routed_scaling_factor=1.0, num_attention_heads=3, num_key_value_heads=3, v_head_dim=24,
                 qk_nope_head_dim=48, qk_rope_head_dim=8, kv_lora_rank=96, hidden_size=96, rope_scaling=YARN),
    # No rope scaling, 6 groups, 5 of 96 experts, another dense/MoE pattern, f32 weights.
    "plain": dict(n_group=6, topk_group=2, n_routed_experts=96, num_experts_per_tok=5, num_attention_heads=6,
                  num_key_value_heads=6, moe_layer_freq=2, first_k_dense_replace=2, num_hidden_layers=5,
                  routed_scaling_factor=2.5, hidden_size=48, q_lora_rank=40, rope_theta=5000),
    # mscale unlike mscale_all_dim, renormalised weights, tied embeddings, no shared experts, newer field names.
    "mscale": dict(norm_topk_prob=True, tie_word_embeddings=True, n_shared_experts=0, n_routed_experts=24, n_group=4,
                   topk_group=2, num_experts_per_tok=3, first_k_dense_replace=0, num_hidden_layers=3,
                   rope_scaling=dict(YARN, mscale=1.0, factor=10)),
}
F32 = {"plain"}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def margins(cfg, scores):
    """Relative gap between what was chosen last and what was left out first: groups, then experts."""
    k = cfg["num_experts_per_tok"]
    group_gap = np.ones(len(scores))
    masked = scores
    if cfg["topk_method"] == "group_limited_greedy":
        best = scores.reshape(len(scores), cfg["n_group"], -1).max(-1)
        order = np.sort(best, -1)[:, ::-1]
        g = cfg["topk_group"]
        group_gap = (order[:, g - 1] - order[:, g]) / order[:, g - 1]
        kept = best >= order[:, g - 1 : g]
        masked = np.where(np.repeat(kept, scores.shape[1] // cfg["n_group"], 1), scores, -1.0)
    order = np.sort(masked, -1)[:, ::-1]
    return np.minimum(group_gap, (order[:, k - 1] - order[:, k]) / order[:, k - 1])


def round_bf16(oracle, x):
    return oracle.bf16_to_f32(oracle.f32_to_bf16(np.ascontiguousarray(x, np.float32))).astype(np.float64)


def bf16_model(oracle, model, forced):
    """The oracle with activations rounded to bf16 where Minke's bf16 mode rounds them, and the routing forced."""
    r = lambda x: round_bf16(oracle, x)

    class Rounded(oracle.Model):
        def __init__(self):
            super().__init__(model.cfg, {k: (r(v).astype(np.float32)) for k, v in model.w.items()}, np.float64)

        def _ffn(self, x, prefix):
            w = lambda n: self._w(f"{prefix}.{n}_proj.weight").T
            x = r(x)
            return r(oracle.silu(x @ w("gate")) * (x @ w("up"))) @ w("down")

        def attention(self, x, prefix):
            c, t = self.cfg, x.shape[0]
            heads, nope, rope, vd = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
            pos = np.arange(t, dtype=np.float64)
            x = r(x)
            if c.get("q_lora_rank"):
                q = r(self._norm(x @ self._w(prefix + ".q_a_proj.weight").T, prefix + ".q_a_layernorm.weight"))
                q = q @ self._w(prefix + ".q_b_proj.weight").T
            else:
                q = x @ self._w(prefix + ".q_proj.weight").T
            q = q.reshape(t, heads, nope + rope).transpose(1, 0, 2)
            q_nope, q_rope = r(q[..., :nope]), oracle.apply_rope(q[..., nope:], pos, c)
            latent = x @ self._w(prefix + ".kv_a_proj_with_mqa.weight").T
            c_kv = r(self._norm(latent[:, : c["kv_lora_rank"]], prefix + ".kv_a_layernorm.weight"))
            k_rope = r(oracle.apply_rope(latent[:, c["kv_lora_rank"]:], pos, c))
            kv_b = self._w(prefix + ".kv_b_proj.weight").reshape(heads, nope + vd, -1)
            q_latent = np.einsum("htn,hnr->htr", q_nope, kv_b[:, :nope])
            s = (q_latent @ c_kv.T + q_rope @ k_rope.T) * oracle.softmax_scale(c)
            s = np.where(np.tril(np.ones((t, t), bool)), s, -np.inf)
            o = r(oracle.softmax(s) @ c_kv)
            o = r(np.einsum("htr,hvr->htv", o, kv_b[:, nope:])).transpose(1, 0, 2).reshape(t, heads * vd)
            return o @ self._w(prefix + ".o_proj.weight").T

        def moe(self, x, prefix, routing):
            c = self.cfg
            x = r(x)
            scores = oracle.softmax(x @ self._w(prefix + ".gate.weight").T)
            idx = forced[len(routing)]
            w = np.take_along_axis(scores, idx, 1)
            if c.get("norm_topk_prob"):
                w = w / (w.sum(-1, keepdims=True) + 1e-20)
            else:
                w = w * c.get("routed_scaling_factor", 1.0)
            routing.append((idx, w))
            groups = c["n_group"] if c["topk_method"] == "group_limited_greedy" else min(8, c["n_routed_experts"])
            partial = np.zeros((groups,) + x.shape)
            for e in np.unique(idx):
                t, slot = np.nonzero(idx == e)
                partial[int(((e + 1) * groups - 1) // c["n_routed_experts"]), t] += w[t, slot, None] * self._ffn(x[t], f"{prefix}.experts.{e}")
            y = sum(r(p) for p in partial)
            return y + (self._ffn(x, prefix + ".shared_experts") if c.get("n_shared_experts") else 0)

        def forward(self, ids):
            out = super().forward(ids)
            x = out.hidden[-1]
            head = "model.embed_tokens.weight" if self.cfg.get("tie_word_embeddings") else "lm_head.weight"
            out.logits = r(self._norm(x, "model.norm.weight")) @ self._w(head).T
            return out

    return Rounded()


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--oracle", required=True)
    a.add_argument("--minke", required=True)
    a.add_argument("--tokens", type=int, default=160)
    a.add_argument("--greedy", type=int, default=24)
    args = a.parse_args()
    spec = importlib.util.spec_from_file_location("oracle", args.oracle)
    oracle = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = oracle
    spec.loader.exec_module(oracle)
    for name, changes in SHAPES.items():
        cfg = dict(BASE, **changes)
        config = os.path.join(HERE, name + ".json")
        published = {k: v for k, v in cfg.items() if v is not None or k == "q_lora_rank"}
        if name == "mscale":   # the newer spelling
            rope = dict(published.pop("rope_scaling"))
            rope["rope_type"] = rope.pop("type")
            published["rope_parameters"] = rope
        json.dump(published, open(config, "w"), indent=1)
        open(config, "a").write("\n")
        seed = 1
        with tempfile.TemporaryDirectory() as tmp:
            path = os.path.join(tmp, name)
            subprocess.run([args.minke, "checkpoint", "make", path, "--config", config, "--seed", str(seed), "--dtype",
                            "f32" if name in F32 else "bf16"], check=True, stdout=subprocess.DEVNULL)
            json.dump(cfg, open(os.path.join(path, "config.json"), "w"))   # the oracle reads the older spelling
            model = oracle.Model.load(path)
            ids = np.random.default_rng(1).integers(2, cfg["vocab_size"], args.tokens)
            scores = []
            plain_top_k = oracle.device_limited_top_k
            def spy(s, c):
                scores.append(s)
                return plain_top_k(s, c)
            oracle.device_limited_top_k = spy
            out = model.forward(ids)
            oracle.device_limited_top_k = plain_top_k
            logprobs = log_softmax(out.logits)
            t = {"input_ids": ids.astype(np.int32),
                 "token_logprobs": logprobs[np.arange(len(ids) - 1), ids[1:]].astype(np.float32),
                 "logits_tail": out.logits[-8:].astype(np.float32),
                 "routing": np.stack([e for e, _ in out.routing]).astype(np.int32),
                 "routing_weights": np.stack([w for _, w in out.routing]).astype(np.float32),
                 "routing_margins": np.stack([margins(cfg, s) for s in scores]).astype(np.float32)}
            half = [int(i) for i in ids[: args.tokens // 2]]
            seq, gaps = list(half), []
            for _ in range(args.greedy):
                last = model.forward(seq).logits[-1]
                top = np.sort(last)[-2:]
                gaps.append(top[1] - top[0])
                seq.append(int(last.argmax()))
            t["greedy_prompt"] = np.array(half, np.int32)
            t["greedy_ids"], t["greedy_gaps"] = np.array(seq[len(half):], np.int32), np.array(gaps, np.float32)
            rounded = bf16_model(oracle, model, [e for e, _ in out.routing]).forward(ids)
            emulated = log_softmax(rounded.logits)[np.arange(len(ids) - 1), ids[1:]]
            t["bf16_forced_token_logprobs"] = emulated.astype(np.float32)
            oracle.write_safetensors(os.path.join(HERE, name + ".safetensors"), t)
            error = np.linalg.norm(emulated - t["token_logprobs"]) / np.linalg.norm(t["token_logprobs"])
            print(f"{name}: logits std {out.logits.std():.2f}, smallest routing margin {t['routing_margins'].min():.1e}, "
                  f"smallest greedy gap {min(gaps):.4f}, emulated bf16 error {error:.2e}")


if __name__ == "__main__":
    main()
