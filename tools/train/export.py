"""To the published checkpoint layout and back: config.json, model.safetensors in BF16, tokenizer.json and its config.

    export.py RUN DIR        the best weights of a training run (train.py --out RUN), as a folder that Minke serves
"""
import argparse
import json
import os
import struct

import numpy as np
import torch

from model import DeepseekV2, ModelConfig
from tokenizer import Tokenizer

PUBLISHED_FIELDS = ("vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
                    "num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
                    "n_shared_experts n_routed_experts num_experts_per_tok n_group topk_group routed_scaling_factor "
                    "first_k_dense_replace max_position_embeddings rope_theta rms_norm_eps").split()


def published_config(config, tokenizer):
    if config.attention != "mla" or config.ffn_extra:
        raise ValueError(f"attention={config.attention}, ffn_extra={config.ffn_extra} have no published layout")
    out = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "torch_dtype": "bfloat16",
           "hidden_act": "silu"}
    out.update((field, getattr(config, field)) for field in PUBLISHED_FIELDS)
    out.update(num_key_value_heads=config.num_attention_heads, moe_layer_freq=1, norm_topk_prob=False,
               scoring_func="softmax", topk_method="group_limited_greedy", rope_scaling=None, attention_bias=False,
               tie_word_embeddings=False, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    return out


def to_published(state, config):
    """Splits the stacked experts; everything else already has its published name."""
    width, out = config.moe_intermediate_size, {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            gate, up = tensor.chunk(2, 0)
            for e in range(config.n_routed_experts):
                rows = slice(e * width, (e + 1) * width)
                out[f"{prefix}.{e}.gate_proj.weight"], out[f"{prefix}.{e}.up_proj.weight"] = gate[rows], up[rows]
        elif last == "down_proj":  # only the stacked one is a parameter; others end in .weight
            for e in range(config.n_routed_experts):
                out[f"{prefix}.{e}.down_proj.weight"] = tensor[:, e * width:(e + 1) * width]
        else:
            out[name] = tensor
    return out


def from_published(tensors, config):
    state = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        every = lambda which: [tensors[f"{prefix}.{e}.{which}.weight"] for e in range(config.n_routed_experts)]
        state[f"{prefix}.gate_up_proj"] = torch.cat(every("gate_proj") + every("up_proj"), 0)
        state[f"{prefix}.down_proj"] = torch.cat(every("down_proj"), 1)
    return state


def write_safetensors(path, tensors):
    """All tensors as BF16, in the order of their names."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(tensors):
        blob = tensors[name].detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_safetensors(path):
    """BF16 tensors, as float32."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    out = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        if t["dtype"] != "BF16":
            raise ValueError(f"{path}: {name}: expected BF16, found {t['dtype']}")
        bits = np.frombuffer(data, np.uint16, offset=t["data_offsets"][0], count=int(np.prod(t["shape"])))
        out[name] = torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).reshape(t["shape"])
    return out


def export(state, config, tokenizer, directory):
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w") as f:
        f.write(json.dumps(published_config(config, tokenizer), indent=1) + "\n")
    write_safetensors(os.path.join(directory, "model.safetensors"), to_published(state, config))
    tokenizer.save(directory)


def load_checkpoint(directory):
    """(model with the BF16 weights widened to float32, tokenizer) of an exported folder."""
    with open(os.path.join(directory, "config.json")) as f:
        published = json.load(f)
    config = ModelConfig(**{field: published[field] for field in PUBLISHED_FIELDS})
    model = DeepseekV2(config)
    tensors = read_safetensors(os.path.join(directory, "model.safetensors"))
    model.load_state_dict(from_published(tensors, config))
    return model.eval(), Tokenizer.load(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("directory")
    arguments = parser.parse_args()
    best = torch.load(os.path.join(arguments.run, "best.pt"), map_location="cpu")
    config = ModelConfig(**best["model_config"])
    export(best["weights"], config, Tokenizer.load(arguments.run), arguments.directory)
    size = sum(os.path.getsize(os.path.join(arguments.directory, f)) for f in os.listdir(arguments.directory))
    print(f"{arguments.directory}: step {best['step']}, {best['which']}, validation {best['loss']:.4f} nats per "
          f"character, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
