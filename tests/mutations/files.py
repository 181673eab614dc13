"""Damage of the config's JSON, of files that may lie beside it, and of which files there are."""

import json
import random
from typing import Any

from tests.mutations.kinds import CONFIG, DIRECTORY, MISSING, WEIGHTS, Files, Mutation, flipped

# Python's `re` takes ages to find that it matches no module.
BACKTRACKS = "([a-z_.0-9]+)+X"

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 8, 257, 1.5, -0.0, 10**30, 10**400, float("nan"), float("inf"),
    "", "8", "LORA", "\ud800", "\n\u2028", "x" * 10_000, [], [[]], ["q_proj"], [None], [1], {},
    {"": 1}, {"q_proj": 2}, {"q_proj": "2"}, {BACKTRACKS: 1}, {"(": 1},
    {"(?=a)": 4}, {"*": 8}, {"a{,3}": 4}, {r"\pL": 8}, {"q_proj": 10**9}, {"\ud800": 1},
    {str(i): 1 for i in range(3000)},
]  # fmt: skip
NEW_FIELDS = ["use_dora", "modules_to_save", "some_new_field", "layer_replication", "\ud800", ""]


def swapped_types(rng: random.Random, config: bytes, weights: bytes) -> Files:
    fields = json.loads(config)
    for _ in range(rng.randint(1, 2)):
        fields[rng.choice(sorted(fields))] = rng.choice(ODD_VALUES)
    return {CONFIG: json.dumps(fields).encode()}


def strange_patterns(rng: random.Random, config: bytes, weights: bytes) -> Files:
    fields = json.loads(config)
    fields[rng.choice(["rank_pattern", "alpha_pattern"])] = rng.choice(ODD_VALUES)
    return {CONFIG: json.dumps(fields).encode()}


def new_fields(rng: random.Random, config: bytes, weights: bytes) -> Files:
    fields = json.loads(config)
    fields[rng.choice(NEW_FIELDS)] = rng.choice(ODD_VALUES)
    return {CONFIG: json.dumps(fields).encode()}


def missing_field(rng: random.Random, config: bytes, weights: bytes) -> Files:
    fields = json.loads(config)
    del fields[rng.choice(sorted(fields))]
    return {CONFIG: json.dumps(fields).encode()}


def deep_json(rng: random.Random, config: bytes, weights: bytes) -> Files:
    depth = rng.choice([10, 300, 900, 100_000, 1_000_000])
    nested = b"[" * depth + b"]" * depth
    return {CONFIG: config.rstrip()[:-1] + b', "target_modules": ' + nested + b"}"}


def huge_numbers(rng: random.Random, config: bytes, weights: bytes) -> Files:
    name = rng.choice([b"r", b"lora_alpha", b"layers_to_transform", b"some_new_field"])
    number = rng.choice(
        [b"1" * 5_000, b"1" * 1_000_000, b"1e999", b"-1e999", b"1" * 300, b"1e-999"]
    )
    return {CONFIG: config.rstrip()[:-1] + b', "' + name + b'": ' + number + b"}"}


def other_encoding(rng: random.Random, config: bytes, weights: bytes) -> Files:
    text = config.decode().replace("LORA", rng.choice(["LORA", "LORÄ"]))
    encodings = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"]
    return {CONFIG: text.encode(rng.choice(encodings), "replace")}


def duplicate_keys(rng: random.Random, config: bytes, weights: bytes) -> Files:
    name = rng.choice(sorted(json.loads(config)))
    value = json.dumps(rng.choice(ODD_VALUES)).encode()
    return {CONFIG: config.rstrip()[:-1] + b", " + json.dumps(name).encode() + b": " + value + b"}"}


def damaged_json(rng: random.Random, config: bytes, weights: bytes) -> Files:
    cut = config[: rng.randrange(len(config))]
    return {CONFIG: rng.choice([cut, b"", b"null", b"[1]", b'"LORA"', b"\x00" * 99, b"{}" * 9])}


def flipped_json(rng: random.Random, config: bytes, weights: bytes) -> Files:
    return {CONFIG: flipped(rng, config, len(config))}


def large_json(rng: random.Random, config: bytes, weights: bytes) -> Files:
    return {CONFIG: config + b" " * rng.choice([1 << 20, 1 << 23])}


def text_files(rng: random.Random, config: bytes, weights: bytes) -> Files:
    """What a folder may say of text beside the two files, and what it should not."""
    name = rng.choice(["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
    odd = [b"", b"{", b"[" * 100_000, b"\xff\xfe", b" " * (1 << 23), b"{% for m in x %}", b"{}"]
    return {
        name: rng.choice([*odd, json.dumps({"chat_template": rng.choice(ODD_VALUES)}).encode()])
    }


def other_files(rng: random.Random, config: bytes, weights: bytes) -> Files:
    """A file that is missing, a directory, pickled or the other one."""
    name = rng.choice([CONFIG, WEIGHTS])
    changes: list[Files] = [
        {name: MISSING},
        {name: DIRECTORY},
        {CONFIG: weights},
        {WEIGHTS: config},
        {WEIGHTS: MISSING, "adapter_model.bin": b"\x80\x04."},
    ]
    return rng.choice(changes)


FILE_MUTATIONS: list[Mutation] = [
    swapped_types, strange_patterns, new_fields, missing_field, deep_json, huge_numbers,
    other_encoding, duplicate_keys, damaged_json, flipped_json, large_json, text_files,
    other_files,
]  # fmt: skip
