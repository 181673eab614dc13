"""Damage of the weights' file: its bytes, its header's words, its numbers."""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from tests.mutations.kinds import WEIGHTS, Files, Mutation, flipped

DTYPES = [
    "F32", "F16", "BF16", "F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4",
    "C64", "NOPE", "", 3, None,
]  # fmt: skip


def truncated_weights(rng: random.Random, config: bytes, weights: bytes) -> Files:
    return {WEIGHTS: weights[: rng.randrange(len(weights))]}


def longer_weights(rng: random.Random, config: bytes, weights: bytes) -> Files:
    return {WEIGHTS: weights + rng.randbytes(rng.randint(1, 64))}


def flipped_header_bits(rng: random.Random, config: bytes, weights: bytes) -> Files:
    return {WEIGHTS: flipped(rng, weights, 8 + _header_len(weights))}


def flipped_bits(rng: random.Random, config: bytes, weights: bytes) -> Files:
    return {WEIGHTS: flipped(rng, weights, len(weights))}


def lying_header_length(rng: random.Random, config: bytes, weights: bytes) -> Files:
    near = _header_len(weights) + rng.choice([-9, -1, 1, 9])
    length = rng.choice([0, 1, near, len(weights), 2**31, 2**40, 2**63, 2**64 - 1])
    return {WEIGHTS: struct.pack("<Q", length) + weights[8:]}


def no_safetensors(rng: random.Random, config: bytes, weights: bytes) -> Files:
    others = [b"", b"PK\x03\x04" * 99, b"\x80\x04K\x01." * 20, b"{}", rng.randbytes(2000)]
    return {WEIGHTS: rng.choice(others)}


def overlapping_offsets(rng: random.Random, config: bytes, weights: bytes) -> Files:
    def change(header: dict[str, Any]) -> None:
        first, second = rng.sample(sorted(header), 2)
        header[first]["data_offsets"] = header[second]["data_offsets"]

    return {WEIGHTS: _reheaded(weights, change)}


def strange_offsets(rng: random.Random, config: bytes, weights: bytes) -> Files:
    def change(header: dict[str, Any]) -> None:
        entry = header[rng.choice(sorted(header))]
        odd = [[0, 2**63], [-4, 0], [2**70, 2**71], [8, 0], [0], "0", None, [0.5, 1]]
        entry["data_offsets"] = rng.choice(odd)

    return {WEIGHTS: _reheaded(weights, change)}


def strange_shapes(rng: random.Random, config: bytes, weights: bytes) -> Files:
    def change(header: dict[str, Any]) -> None:
        entry = header[rng.choice(sorted(header))]
        huge = [[2**40, 2**40], [2**63, 2], [2**64], [-1, 4], [], [0], [1] * 1000, "2", None]
        entry["shape"] = rng.choice([entry["shape"][::-1], *huge])

    return {WEIGHTS: _reheaded(weights, change)}


def strange_dtypes(rng: random.Random, config: bytes, weights: bytes) -> Files:
    def change(header: dict[str, Any]) -> None:
        header[rng.choice(sorted(header))]["dtype"] = rng.choice(DTYPES)

    return {WEIGHTS: _reheaded(weights, change)}


def strange_names(rng: random.Random, config: bytes, weights: bytes) -> Files:
    def change(header: dict[str, Any]) -> None:
        name = rng.choice(sorted(header))
        odd = ["", "\u0000\n", "\ud800", "x" * 100_000, "layers.0." * 10_000, name.upper()]
        odd += [name.replace(".0.", ".99."), name.replace(".weight", ".default.weight")]
        odd += [name.replace("base_model.model.", "_orig_mod."), f"thinker.{name}"]
        header[rng.choice(odd)] = header.pop(name)

    return {WEIGHTS: _reheaded(weights, change)}


def renamed(rng: random.Random, config: bytes, weights: bytes) -> Files:
    """All of the tensors, by what training adds to names: known and unknown, of one and of two."""
    known = [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
        lambda name: name.replace("model.layers", "language_model.model.layers"),
    ]
    unknown = [
        lambda name: name.replace(".self_attn", ".block.self_attn"),
        lambda name: name.replace("model.layers", "talker.model.layers"),
        lambda name: name.replace(".weight", ".one.weight" if "q_proj" in name else ".two.weight"),
    ]
    header, data = _split(weights)
    change = rng.choice(known + unknown)
    renamed = {change(name): entry for name, entry in header.items()}
    return {WEIGHTS: _joined(json.dumps(renamed).encode(), data)}


def whole_tensors(rng: random.Random, config: bytes, weights: bytes) -> Files:
    """Beside the LoRA matrices."""
    header, data = _split(weights)
    shape = rng.choice([[262, 64], [262], [2, 262 * 32], [], [0, 64]])
    dtype, size = rng.choice([("F32", 4), ("F16", 2), ("I64", 8), ("F8_E4M3", 1), ("F4", 1)])
    num_bytes = math.prod(shape) * size
    name = rng.choice(["lm_head.weight", "model.embed_tokens.modules_to_save.default.weight"])
    offsets = [len(data), len(data) + num_bytes]
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return {WEIGHTS: _joined(json.dumps(header).encode(), data + bytes(num_bytes))}


def strange_metadata(rng: random.Random, config: bytes, weights: bytes) -> Files:
    def change(header: dict[str, Any]) -> None:
        odd = [{"format": 1}, [], "pt", {"x": "y" * 100_000}, {"format": "tf"}]
        header["__metadata__"] = rng.choice(odd)

    return {WEIGHTS: _reheaded(weights, change)}


def duplicate_names(rng: random.Random, config: bytes, weights: bytes) -> Files:
    header, data = _split(weights)
    name = rng.choice(sorted(header))
    twin = header[rng.choice(sorted(header))]
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(twin)}}}"
    return {WEIGHTS: _joined(text.encode(), data)}


def deep_header(rng: random.Random, config: bytes, weights: bytes) -> Files:
    depth = rng.choice([100, 10_000, 1_000_000])
    return {WEIGHTS: _joined(b'{"a":' * depth, _split(weights)[1])}


def strange_numbers(rng: random.Random, config: bytes, weights: bytes) -> Files:
    """NaN, infinity or merely another number somewhere in the data."""
    place = 8 + _header_len(weights)
    place += 4 * rng.randrange((len(weights) - place) // 4)
    value = rng.choice([float("nan"), float("inf"), float("-inf"), 1e38, -0.0, 1e-45, 3.5])
    return {WEIGHTS: weights[:place] + struct.pack("<f", value) + weights[place + 4 :]}


WEIGHTS_MUTATIONS: list[Mutation] = [
    truncated_weights, longer_weights, flipped_header_bits, flipped_bits, lying_header_length,
    no_safetensors, overlapping_offsets, strange_offsets, strange_shapes, strange_dtypes,
    strange_names, renamed, whole_tensors, strange_metadata, duplicate_names, deep_header,
    strange_numbers,
]  # fmt: skip


def _header_len(weights: bytes) -> int:
    return int(struct.unpack("<Q", weights[:8])[0])


def _split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + _header_len(weights)
    header = json.loads(weights[8:end])
    header.pop("__metadata__", None)
    return header, weights[end:]


def _joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _reheaded(weights: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    header, data = _split(weights)
    change(header)
    return _joined(json.dumps(header).encode(), data)
