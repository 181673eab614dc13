"""Adapter folders with one thing wrong, by a seed: cut, flipped, re-headed and retyped."""

import json
import random
from collections.abc import Callable
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def mutate(folder: Path, seed: int) -> str:
    """Change a copy of a good adapter in place; returns what was done to it."""
    rng = random.Random(seed)
    kind = list(MUTATIONS)[seed % len(MUTATIONS)]
    MUTATIONS[kind](folder, rng)
    return f"{kind} (seed {seed})"


def _cut(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: rng.randrange(len(data))])

    return change


def _flip(name: str, most: int) -> Callable[[Path, random.Random], None]:
    """Flip bits in the first `most` bytes."""

    def change(folder: Path, rng: random.Random) -> None:
        data = bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 1, 8))):
            data[rng.randrange(min(most, len(data)))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)

    return change


def _length(folder: Path, rng: random.Random) -> None:
    """Lie about the header's length."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    lie = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
    (folder / WEIGHTS).write_bytes(lie.to_bytes(8, "little") + data[8:])


def _header(folder: Path, rng: random.Random) -> None:
    """Lie in the header of a tensor."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = header[name]
    lie = rng.randrange(9)
    if lie == 0:
        entry["shape"] = [2**40, 2**40]
    elif lie == 1:
        entry["shape"] = entry["shape"][::-1]
    elif lie == 2:
        entry["dtype"] = rng.choice(("F8_E4M3", "I64", "BOOL", "F1", "", 7, None))
    elif lie == 3:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif lie == 4:
        entry["data_offsets"] = [2**62, 2**63]
    elif lie == 5:
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif lie == 6:
        header[rng.choice(("", "x" * 5000, "lora_A", other + ".weight"))] = header.pop(name)
    elif lie == 7:
        entry["shape"] = rng.choice(([], [-1, 64], [8.5, 64], "shape", None))
    else:
        header["__metadata__"] = rng.choice(({"format": 1}, [], "pt"))
    new = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def _values(folder: Path, rng: random.Random) -> None:
    """NaN, infinity or zeros in place of some weights."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + rng.randrange((len(data) - start) // 4) * 4
    data[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\0\0\0\0"))
    (folder / WEIGHTS).write_bytes(data)


def _field(folder: Path, rng: random.Random) -> None:
    """Another value of one field of the config, or one field less."""
    fields = json.loads((folder / CONFIG).read_text())
    name = rng.choice(
        ("r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "target_modules", "bias")
        + ("use_rslora", "modules_to_save", "layers_to_transform", "base_model_name_or_path")
        + ("init_lora_weights", "use_dora", "task_type", "peft_version", "new_field")
    )
    values = (None, True, -1, 0, 1.5, 10**400, "x", "", [], [[]], ["q_proj"], {}, {"a": {}})
    value = rng.choice((*values, {"([a-z_.0-9]+)+X": 4}, {"(?=a)": 4}, {"*": 8}, {"q_proj": 10**9}))
    fields[name] = value
    if rng.random() < 0.1:
        del fields[name]
    (folder / CONFIG).write_text(json.dumps(fields))


def _text(folder: Path, rng: random.Random) -> None:
    """A config that is other text, or the same in another encoding."""
    data = (folder / CONFIG).read_bytes()
    twice = data.rstrip()[:-1] + b', "r": 4}'
    other = rng.choice(
        (b"", b"null", b"[" * 100_000, b"{" * 5000, b'"r"', b"NaN", b"\xff\xfe{}", b"\0" * 64)
        + (data.decode().encode("utf-16"), data.decode().encode("utf-8-sig"), twice)
        + (b'{"r": ' + b"9" * 5000 + b"}", data + b"x", b'{"peft_type": "LORA", "r": 1e999}')
    )
    (folder / CONFIG).write_bytes(other)


def _file(folder: Path, rng: random.Random) -> None:
    """A file that is missing, a directory, or another file's content."""
    path = folder / rng.choice((CONFIG, WEIGHTS))
    other = (folder / (WEIGHTS if path.name == CONFIG else CONFIG)).read_bytes()
    path.unlink()
    change = rng.randrange(4)
    if change == 0:
        path.mkdir()
    elif change == 1:
        path.write_bytes(other)
    elif change == 2:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "cut weights": _cut(WEIGHTS),
    "cut config": _cut(CONFIG),
    "flipped header": _flip(WEIGHTS, 2000),
    "flipped weights": _flip(WEIGHTS, 10**9),
    "flipped config": _flip(CONFIG, 10**9),
    "header length": _length,
    "header entry": _header,
    "values": _values,
    "field": _field,
    "text": _text,
    "file": _file,
}
