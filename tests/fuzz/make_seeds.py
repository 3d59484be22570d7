#!/usr/bin/env python3
"""Writes what a person would give the fuzz targets to begin with: tests/fuzz/corpus/TARGET/seed-NAME. Findings and minimised
inputs lie beside them (tests/fuzz/run --merge)."""
import json, os, struct

ROOT = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(ROOT))
PART = b"\n--part--\n"


def seed(target, name, data):
    folder = os.path.join(ROOT, "corpus", target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "seed-" + name), "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())


def header(kind, payload, rows=1, pairs=0, row_begin=0, layer=0, microbatch=0):
    return struct.pack("<IBBBBIIQQHHIIIIIII", 0x314B4E4D, 1, kind, 0, 0, 1, 1, 5, 9, layer, microbatch, 0, rows, pairs,
                       len(payload), 0, row_begin, 0)


def padded(data):
    return data + bytes(-len(data) % 64)


def wire():
    rows = b"\x01" * 8   # hidden 4, bf16
    work = padded(struct.pack("<IHBB", 3, 0, 0, 2) + struct.pack("<fHH", 0.5, 1, 0) + struct.pack("<fHH", 0.25, 4, 0)) + rows
    plan = struct.pack("<Q", 77) + struct.pack("<ff", 0.5, 0.25) + struct.pack("<HH", 1, 4) + struct.pack("<HH", 0, 0xFFFF)
    row_list = struct.pack("<IHH", 3, 1, 0)
    for name, kind, payload, fields in (
            ("dispatch", 16, rows, {}), ("plan", 17, plan, dict(pairs=1)), ("work", 18, work, dict(pairs=2)),
            ("partial", 19, padded(row_list) + rows, {}), ("nack", 20, row_list, {}), ("busy", 21, struct.pack("<IHH", 3, 0xFFFF, 0), {}),
            ("reject", 22, row_list, {}), ("page-request", 23, struct.pack("<64I", *range(64)), dict(rows=64)),
            ("page-transfer", 24, b"\x02" * 64, dict(rows=1, pairs=1)), ("page-end", 25, b"", dict(rows=0, pairs=3)),
            ("page-ack", 26, b"", dict(rows=0, row_begin=2)), ("unit-request", 27, struct.pack("<Q", 99), dict(rows=4)),
            ("unit-piece", 28, b"\x03", dict(rows=0, pairs=1)), ("unit-absent", 29, b"", dict(rows=0))):
        seed("wire_frames", name, b"\x00" + header(kind, payload, **fields) + payload)


def hello(node, peer):
    return struct.pack("<QQQ32sIIIBBBB24s", node, peer, 7, bytes(range(32)), 64, 64, 250, 1, 1, 2, 0, bytes(24))


def handshake():
    def message(kind, payload):
        return bytes([kind, len(payload)]) + payload
    seed("handshake", "to-initiator", b"\x00" + message(1, hello(2, 1)) + message(2, bytes(32)) + message(3, bytes(8)))
    seed("handshake", "to-responder", b"\x01" + message(1, hello(2, 1)) + message(2, bytes(32)) + message(3, bytes(8)))
    seed("handshake", "refused", b"\x00" + message(3, struct.pack("<II", 9, 5) + b"never"))
    for which in range(6):
        seed("handshake", "changed-%d" % which, bytes([2, 0, which]) + struct.pack("<HBB", 40, 1, 0))
    seed("handshake", "unchanged", bytes([2, 0, 0]) + struct.pack("<HBB", 0, 0, 0))


def openai():
    completion = {"model": "small", "prompt": "Hello, world 123", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
                  "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "seed": 7, "n": 2, "best_of": 2, "stream": True,
                  "stream_options": {"include_usage": True}, "stop": ["\n", "end"], "logprobs": 3, "logit_bias": {"5": -100}, "echo": True,
                  "stop_token_ids": [3], "ignore_eos": True, "timeout_s": 3.5, "return_token_ids": True, "suffix": "", "user": "x"}
    chat = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi ☃"}]},
                         {"role": "assistant", "content": None}, {"role": "user", "content": "<｜User｜><｜end▁of▁sentence｜>"}],
            "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2, "tool_choice": "none", "response_format": {"type": "text"},
            "modalities": ["text"]}
    for name, first, body in (("completion", 0, completion), ("chat", 1, chat), ("ids", 2, dict(completion, prompt=[[5, 6], [7]], stop=None)),
                              ("texts", 0, {"prompt": ["a", "b"], "n": 3}), ("no-chat", 3, chat), ("tools", 1, dict(chat, tools=[{"type": "function"}])),
                              ("edges", 0, {"prompt": [0], "seed": 2**64 - 1, "max_tokens": 0, "temperature": 0})):
        seed("openai_request", name, bytes([first]) + json.dumps(body, ensure_ascii=False).encode())
    seed("openai_request", "deep", b"\x00" + b"[" * 70)
    seed("openai_request", "not-utf8", b'\x00{"prompt": "\xff\xfe"}')
    seed("openai_request", "surrogates", b'\x01{"messages": [{"role": "user", "content": "\\ud83d\\ude00 \\ud800"}]}')


def chat():
    for kind in range(3):
        seed("chat_template", "turns-%d" % kind, bytes([kind]) + PART.join(
            [b"\x00Be brief.", b"\x01Hi \xe2\x98\x83", b"\x02Hello<\xef\xbd\x9cend\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>",
             b"\x01<\xef\xbd\x9cUser\xef\xbd\x9c>Assistant: <\xef\xbd\x9cAssistant\xef\xbd\x9c>\xc3\xb6\xc3\xbc"]))


def tokenizer():
    small = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ċ": 4}, "merges": ["a b"]},
             "added_tokens": [{"id": 5, "content": "<s>", "special": True}, {"id": 6, "content": "ö", "special": False}],
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                 {"type": "Split", "pattern": {"Regex": "[\r\n]"}, "behavior": "Isolated", "invert": False},
                 {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
             "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}]},
             "decoder": {"type": "ByteLevel"}, "normalizer": {"type": "Sequence", "normalizers": []}}
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "add_bos_token": True, "chat_template": "User: Assistant:"}
    for name, file, other in (("small", small, config), ("alone", small, None), ("pairs", dict(small, model=dict(small["model"], merges=[["a", "b"]])), config)):
        seed("tokenizer_json", name, json.dumps(file, ensure_ascii=False).encode() + PART + (json.dumps(other).encode() if other else b"") + PART + b"ab a\n1 \xc3\xb6")


def checkpoint():
    def tensors(entries, data):
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data
    norm = {"model.norm.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    more = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "b": {"dtype": "F16", "shape": [], "data_offsets": [8, 10]}}
    with open(os.path.join(REPOSITORY, "bench", "v2-bench.config.json")) as f:
        config = f.read()
    seed("checkpoint", "one-file", PART + PART + tensors(norm, b"\x80?" * 4))
    seed("checkpoint", "index", PART + json.dumps({"weight_map": {"model.norm.weight": "a.safetensors", "a": "b.safetensors"}}).encode() + PART
         + tensors(norm, bytes(8)) + PART + tensors(more, bytes(10)))
    seed("checkpoint", "config", json.dumps(json.loads(config)).encode() + PART + PART + tensors(more, bytes(10)))
    seed("checkpoint", "truncated", PART + PART + struct.pack("<Q", 1 << 40))
    seed("model_config", "v2-bench", config)
    lite = dict(json.loads(config), q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, eos_token_id=[1, 2])
    lite["rope_parameters"] = dict(lite.pop("rope_scaling"), rope_type="yarn")
    seed("model_config", "lite", json.dumps(lite))
    seed("model_config", "dense", json.dumps({k: v for k, v in json.loads(config).items() if k not in ("n_routed_experts", "rope_scaling")}))


def events():
    chunk = {"choices": [{"text": "a", "token_ids": [1], "finish_reason": None}], "usage": None}
    last = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}
    text = "data: %s\n\ndata: %s\r\n\r\n: comment\ndata: [DONE]\n\n" % (json.dumps(chunk), json.dumps(last))
    seed("stream_events", "completion", b"\x03" + text.encode())
    seed("stream_events", "chat", b"\x07\xef\xbb\xbfevent: x\rdata: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"hi\", \"reasoning_content\": \"\"}, \"finish_reason\": \"stop\"}]}\r\r")
    seed("stream_events", "error", b"\x01event: error\ndata: {\"error\": {\"message\": \"no\"}}\n\nerror: {\"message\": \"old\"}\n\ndata: a\ndata: b\n")


def operators():
    loads = {"intervals": [{"rows": [[1, 2, 3, 4, 5, 6, 7, 8]] * 2, "experts": [[8, 7, 6, 5, 4, 3, 2, 1.5]] * 2}]}
    seed("operator_files", "loads", b"\x00" + json.dumps(loads).encode())
    own = {"name": "x", "bf16_tflops": 100, "mla_decode_tflops": 90, "mla_prefill_tflops": 80, "expert_tflops": 70, "expert_fp8_tflops": 60, "read_gb_s": 1000,
           "expert_gb_s": 900, "expert_fp8_gb_s": 800, "memory_gb": 80, "overlap": 2, "layer_us": 50, "crossing_us": 20, "crossing_gb_s": 9,
           "launch_us": 60, "launch_gb_s": 20}
    gpu = {"device": "H", "copy_gbps": 4000, "product_tflops": 700, "rows": [{"work": "FFN bf16, x", "tflops": 600, "gbps": 4000},
                                                                            {"work": "MLA decode, 128 heads", "tflops": 500}]}
    cpu = {"context": {"ceilings": {"read_bytes_per_second": 3e10, "bf16_flops_per_second": 4e11}},
           "benchmarks": [{"name": "GroupedFfn/1", "bytes": 1e8, "flops": 1e9, "bytes_per_second": 2e10, "GFLOP/s": 200}, {"name": "MlaDecode/1", "GFLOP/s": 90}]}
    table = {"serve": {"GB/s decode 1": 33, "GFLOP/s decode 1": 400}}
    for name, which, file in (("own", 1, own), ("own-over", 2, {"overlap": 1}), ("gpu", 2, gpu), ("cpu", 2, cpu), ("table", 2, table)):
        seed("operator_files", name, bytes([which]) + json.dumps(file).encode())
    keys = b"# keys\nsecret-of-24-letters-more name=a requests_per_minute=5 tokens_per_minute=100 concurrency=2\n\n other \r\n"
    seed("operator_files", "keys", b"\x03" + keys)
    seed("operator_files", "tokens", b"\x04one name=x\ntwo\n")


def http():
    for name, text in (
            ("get", "GET /health?x=1 HTTP/1.1\r\nHost: a\r\nX-Request-Id: abc-1\r\n\r\n"),
            ("head-10", "HEAD http://a/v1/models HTTP/1.0\r\nAuthorization: Bearer x\r\nIf-None-Match: \"e\"\r\n\r\n"),
            ("post", "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\ntraceparent: 00-0123456789abcdef0123456789abcdef-0123456789abcdef-01\r\n\r\n{}"),
            ("chunked", "POST /stream HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n"),
            ("expect", "POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n" + PART.decode() + "abc"),
            ("pipelined", "GET /%41%zz HTTP/1.1\r\nHost: a\r\n\r\nPOST /y HTTP/1.1\r\nContent-Length: 1\r\n\r\nxDELETE /z HTTP/1.1\r\n\r\n"),
            ("large", "POST /x HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + "x" * 300), ("both", "POST /x HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            ("worker", "POST /stream HTTP/1.0\r\nContent-Length: 400\r\n\r\n" + "x" * 400), ("nonsense", "\x16\x03\x01\x02\x00"), ("folded", "GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n"),
            ("upgrade", "GET / HTTP/1.1\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n")):
        seed("http_server", name, text)


def etcd():
    def fixed(number, value):
        return bytes([number << 3 | 1]) + struct.pack("<Q", value)
    def member(node, role):
        return fixed(1, node) + field(2, role) + field(3, b"h:1") + field(4, b"h:2") + field(5, 1) + field(8, b"host")
    def unit(layer, group):
        return field(1, layer) + field(2, group)
    expert = field(1, member(1, 4)) + field(2, b"f") + field(3, b"bf16") + field(4, unit(1, 0)) + field(4, unit(2, 3)) + field(11, field(8, 3))
    router = field(1, member(2, 2)) + field(7, field(1, unit(1, 0)) + b"\x11" + struct.pack("<d", 100.0)) + b"\x49" + struct.pack("<d", 10.0)
    attention = field(1, member(3, 3)) + field(11, field(1, 2) + field(3, 5))
    replicas = field(1, unit(1, 0)) + field(2, struct.pack("<Q", 1)) + field(3, struct.pack("<f", 1.0))
    record = field(1, field(1, 1) + field(2, 2)) + field(2, replicas) + field(3, fixed(1, 1) + field(2, unit(1, 0)))
    def made(what, number, value):
        return bytes([what, number]) + struct.pack("<H", len(value)) + value
    seed("etcd_replies", "cluster", b"\x00" + made(0, 0, expert) + made(0, 1, router) + made(0, 2, attention) + made(2, 0, record) + made(3, 0, b"0000000000000002"))
    seed("etcd_replies", "malformed", b"\x00" + made(1, 0, expert[:9]) + made(1, 5, expert) + made(2, 0, b"\xff") + made(3, 0, b"xyz") + made(4, 0, b"model"))
    seed("etcd_replies", "gone", b"\x00" + made(0, 0, expert) + made(0x80, 0, b"") + made(0, 0, expert) + made(0x82, 0, b""))
    kv = field(1, b"/minke/minke/members/0000000000000001") + field(2, 1) + field(3, 2) + field(5, expert) + field(6, 9)
    seed("etcd_replies", "watch", b"\x01" + field(1, field(3, 7)) + field(11, field(2, kv)) + field(11, field(1, 1) + field(2, kv)))
    seed("etcd_replies", "range", b"\x02" + field(1, field(3, 7)) + field(2, kv) + field(2, field(1, b"/minke/minke/placement") + field(5, record)))


def field(number, value):
    """Of a protobuf message: bytes, or an unsigned number."""
    def varint(n):
        out = b""
        while n > 0x7F:
            out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
        return out + bytes([n])
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


if __name__ == "__main__":
    for make in (wire, handshake, openai, chat, tokenizer, checkpoint, events, operators, http, etcd):
        make()
