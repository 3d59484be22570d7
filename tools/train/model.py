"""DeepSeek-V2 in PyTorch, for training: arXiv 2405.04434, sections 2.1 and 2.2, in the published checkpoint's terms.

MLA with decoupled RoPE over interleaved pairs, one dense layer, then 2 shared and 160 routed experts in 8 groups,
top-6 of the 3 best groups, the three balance losses and device-level token dropping. Parameter names are those of the
published checkpoint, except that the routed experts of a layer are stacked: at this size it is faster to compute all
160 experts for every token in three matrix products and multiply by the routing weight (mostly zero) than to gather.

MHA, GQA and MQA take MLA's place for the comparison in docs/training.md; they have no published layout here.
"""
import dataclasses
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class ModelConfig:
    vocab_size: int = 512
    hidden_size: int = 256
    intermediate_size: int = 768          # the dense layers
    moe_intermediate_size: int = 16       # one routed expert
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    q_lora_rank: Optional[int] = 128      # None: queries are projected directly, as in V2-Lite
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_shared_experts: int = 2
    n_routed_experts: int = 160
    num_experts_per_tok: int = 6
    n_group: int = 8
    topk_group: int = 3
    routed_scaling_factor: float = 16.0
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    # For experiments only; the published layout knows neither.
    attention: str = "mla"                # or "mha", "gqa", "mqa"
    num_key_value_heads: int = 8          # of gqa
    ffn_extra: int = 0                    # width added to every always-on FFN, to even out parameter counts

    def kv_heads(self):
        return {"mha": self.num_attention_heads, "gqa": self.num_key_value_heads, "mqa": 1}[self.attention]

    def kv_bytes_per_token(self, bytes_per_value=2):
        """What generation has to keep of one token, all layers."""
        if self.attention == "mla":
            values = self.kv_lora_rank + self.qk_rope_head_dim
        else:
            values = 2 * self.kv_heads() * self.v_head_dim
        return values * bytes_per_value * self.num_hidden_layers


@dataclasses.dataclass
class Regularisation:
    dropout: float = 0.0             # of the embedding and of what a block adds to the residual stream
    attention_dropout: float = 0.0   # of attention probabilities
    capacity_factor: Optional[float] = None   # of a device's share of the work; None: no token is dropped
    exempt_share: float = 0.1        # sequences that are never dropped, so that serving, which drops none, is familiar


@dataclasses.dataclass
class LayerRouting:
    """What one MoE layer chose, per sequence. Choices carry no gradient; probabilities do."""
    tokens: int                  # of one sequence
    chosen: torch.Tensor         # [B, experts] tokens that chose the expert
    probability: torch.Tensor    # [B, experts] mean softmax score
    sent: torch.Tensor           # [B, groups] tokens that go to the group's device
    dropped: torch.Tensor        # [] share of the choices beyond the devices' budget


def balance_factors(routing, config):
    """(expert, device, communication) factors, mean over sequences: the paper's auxiliary losses without the alphas.

    The first two are 1 at perfect balance. The third is then F/M, F being the mean number of devices of a token.
    """
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    groups, limit = config.n_group, config.topk_group
    f = routing.chosen * (experts / (k * routing.tokens))
    per_group = lambda x: x.reshape(x.shape[0], groups, experts // groups)
    group_probability = per_group(routing.probability).sum(-1)
    f_sent = routing.sent * (groups / (limit * routing.tokens))
    return ((f * routing.probability).sum(-1).mean(),
            (per_group(f).mean(-1) * group_probability).sum(-1).mean(),
            (f_sent * group_probability).sum(-1).mean())


def rotate_pairs(x, cos, sin):
    """x [B, T, H, rope], cos and sin [T, rope/2]: the pairs (x[2i], x[2i+1]) turn, as in the published checkpoints."""
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def causal_attention(q, k, v, dropout):
    """q, k [B, T, H, D], v [B, T, H, Dv] -> [B, T, H, Dv]; k and v may have fewer heads. Scale D^-0.5."""
    heads, width = q.shape[2], v.shape[-1]
    if k.shape[2] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if hasattr(F, "scaled_dot_product_attention"):
        # The flash kernel wants one width for all three; zeros in v stay zeros in the output.
        v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)[..., :width]
    else:  # PyTorch 1.x
        t = q.shape[2]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        out = F.dropout(scores.masked_fill(future, -math.inf).float().softmax(-1).to(v.dtype), dropout) @ v
    return out.transpose(1, 2)


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x = x.float()
        if hasattr(F, "rms_norm"):
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class LatentAttention(nn.Module):
    """MLA in its naive form: keys and values are expanded from the latent, which is what training wants."""

    def __init__(self, c):
        super().__init__()
        self.c, heads = c, c.num_attention_heads
        query = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RmsNorm(c.q_lora_rank, c.rms_norm_eps)
            self.q_b_proj = linear(c.q_lora_rank, query)
        else:
            self.q_proj = linear(c.hidden_size, query)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(heads * c.v_head_dim, c.hidden_size)

    def forward(self, x, cos, sin, dropout):
        c, (b, t, _) = self.c, x.shape
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = q.view(b, t, -1, nope + rope).split([nope, rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, -1, nope + c.v_head_dim)
        k_nope, v = kv.split([nope, c.v_head_dim], -1)
        k_rope = rotate_pairs(k_rope[:, :, None], cos, sin).expand(-1, -1, c.num_attention_heads, -1)
        q = torch.cat([q_nope, rotate_pairs(q_rope, cos, sin)], -1)
        out = causal_attention(q, torch.cat([k_nope, k_rope], -1), v, dropout)
        return self.o_proj(out.reshape(b, t, -1))


class HeadAttention(nn.Module):
    """MHA, GQA and MQA: v_head_dim wide heads, all of it rotated."""

    def __init__(self, c):
        super().__init__()
        self.c, width = c, c.v_head_dim
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * width)
        self.k_proj = linear(c.hidden_size, c.kv_heads() * width)
        self.v_proj = linear(c.hidden_size, c.kv_heads() * width)
        self.o_proj = linear(c.num_attention_heads * width, c.hidden_size)

    def forward(self, x, cos, sin, dropout):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.c.v_head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = causal_attention(rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin), v, dropout)
        return self.o_proj(out.reshape(b, t, -1))


class Ffn(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def choose_experts(scores, c):
    """scores [N, experts] -> ids [N, k]: the k best experts of the topk_group groups whose best expert is best."""
    n = scores.shape[0]
    best = scores.view(n, c.n_group, -1).amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(c.topk_group, -1).indices, True)
    # -1, not 0: should all survivors underflow, an expert of another group must still lose.
    allowed = scores.masked_fill(~kept.repeat_interleave(c.n_routed_experts // c.n_group, 1), -1.0)
    return allowed.topk(c.num_experts_per_tok, -1).indices


def within_budget(device, affinity, exempt, devices, capacity_factor):
    """Which choices a device serves: [N, k] bool. Lowest affinity goes first, exempt rows never.

    device, affinity [N, k]; exempt [N]. The budget of each device is capacity_factor times the mean load.
    """
    budget = int(capacity_factor * device.numel() / devices)
    exempt = exempt[:, None].expand_as(device)
    # One sort does it: by device, exempt rows before others, then by falling affinity (which lies in [0, 1]).
    key = device * 4.0 + torch.where(exempt, 0.0, 2.0) + (1.0 - affinity)
    order = key.flatten().argsort()
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    load = torch.zeros(devices, dtype=torch.long, device=order.device)
    load.scatter_add_(0, device.flatten(), torch.ones_like(device.flatten()))
    position = position.view_as(device) - (load.cumsum(0) - load)[device]
    return (position < budget) | exempt


def weighted_swiglu(gate_up, weights):
    """gate_up [N, 2 * experts * width], weights [N, experts] -> silu(gate) * up * weight [N, experts * width]."""
    gate, up = gate_up.chunk(2, -1)
    hidden = (F.silu(gate) * up).view(gate.shape[0], weights.shape[1], -1)
    return (hidden * weights[..., None]).reshape(gate.shape[0], -1)


class RoutedExperts(nn.Module):
    """All experts of a layer: expert e owns rows (of gate and of up) and columns (of down) [e * width, (e+1) * width)."""

    def __init__(self, c):
        super().__init__()
        inner = c.n_routed_experts * c.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(2 * inner, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.hidden_size, inner))
        self.activation = weighted_swiglu

    def forward(self, x, weights):
        gate_up = F.linear(x, self.gate_up_proj)
        activation = self.activation if self.training else weighted_swiglu
        return F.linear(activation(gate_up, weights.to(gate_up.dtype)), self.down_proj)


class Moe(nn.Module):
    def __init__(self, c, regularisation):
        super().__init__()
        self.c, self.r = c, regularisation
        self.gate = linear(c.hidden_size, c.n_routed_experts)
        self.experts = RoutedExperts(c)
        self.shared_experts = Ffn(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size + c.ffn_extra)

    def forward(self, x):
        c, (b, t, d) = self.c, x.shape
        rows = x.reshape(b * t, d)
        with torch.autocast(x.device.type, enabled=False):  # the gate decides: always in float32
            scores = F.linear(rows.float(), self.gate.weight.float()).softmax(-1)
        ids = choose_experts(scores.detach(), c)
        weights = scores.gather(1, ids)
        device = ids // (c.n_routed_experts // c.n_group)
        dropped = torch.zeros((), device=x.device)
        if self.training and self.r.capacity_factor is not None:
            exempt = (torch.rand(b, device=x.device) < self.r.exempt_share).repeat_interleave(t)
            keep = within_budget(device, weights.detach(), exempt, c.n_group, self.r.capacity_factor)
            dropped = 1.0 - keep.float().mean()
            weights = weights * keep
        dense = torch.zeros_like(scores).scatter(1, ids, weights * c.routed_scaling_factor)
        ones = torch.ones((), device=x.device).expand(b, t * c.num_experts_per_tok)
        routing = LayerRouting(
            tokens=t,
            chosen=torch.zeros(b, c.n_routed_experts, device=x.device).scatter_add_(1, ids.view(b, -1), ones),
            probability=scores.view(b, t, -1).mean(1),
            sent=torch.zeros(b * t, c.n_group, device=x.device).scatter_(1, device, 1.0).view(b, t, -1).sum(1),
            dropped=dropped)
        out = self.experts(rows, dense) + self.shared_experts(rows)
        return out.view(b, t, d), routing


class Block(nn.Module):
    def __init__(self, c, regularisation, layer):
        super().__init__()
        self.r = regularisation
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = LatentAttention(c) if c.attention == "mla" else HeadAttention(c)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        dense = layer < c.first_k_dense_replace
        self.mlp = Ffn(c.hidden_size, c.intermediate_size + c.ffn_extra) if dense else Moe(c, regularisation)

    def forward(self, x, cos, sin):
        drop = lambda y: F.dropout(y, self.r.dropout, self.training)
        attention_dropout = self.r.attention_dropout if self.training else 0.0
        x = x + drop(self.self_attn(self.input_layernorm(x), cos, sin, attention_dropout))
        out = self.mlp(self.post_attention_layernorm(x))
        out, routing = out if isinstance(out, tuple) else (out, None)
        return x + drop(out), routing


class Trunk(nn.Module):
    def __init__(self, c, regularisation):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, regularisation, i) for i in range(c.num_hidden_layers))
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)


class DeepseekV2(nn.Module):
    def __init__(self, config, regularisation=None):
        super().__init__()
        self.config, self.r = config, regularisation or Regularisation()
        self.model = Trunk(config, self.r)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        rope = config.qk_rope_head_dim if config.attention == "mla" else config.v_head_dim
        inv_freq = config.rope_theta ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope)
        angle = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * inv_freq
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.apply_init()

    @torch.no_grad()
    def apply_init(self):
        c = self.config
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            fan_in = c.moe_intermediate_size if name.endswith("experts.down_proj") else p.shape[1]
            std = 0.02 if "embed_tokens" in name else 0.5 * fan_in ** -0.5
            if "o_proj" in name or "down_proj" in name:  # these add to the residual stream, twice per layer
                std *= (2 * c.num_hidden_layers) ** -0.5
            p.normal_(0.0, std)

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, vocab] in float32, and the MoE layers' LayerRouting."""
        t = ids.shape[1]
        cos, sin = self.cos[:t], self.sin[:t]
        x = F.dropout(self.model.embed_tokens(ids), self.r.dropout, self.training)
        routings = []
        for layer in self.model.layers:
            x, routing = layer(x, cos, sin)
            if routing is not None:
                routings.append(routing)
        return self.lm_head(self.model.norm(x)).float(), routings

    def compile_activation(self):
        """Fuses the one element-wise step over [tokens, experts * width], where most of the memory traffic is."""
        fused = torch.compile(weighted_swiglu, dynamic=False)
        for module in self.modules():
            if isinstance(module, RoutedExperts):
                module.activation = fused


def count_parameters(config):
    with torch.no_grad():
        return sum(p.numel() for p in DeepseekV2(config).parameters())
