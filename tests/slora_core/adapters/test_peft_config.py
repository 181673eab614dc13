"""`parse_peft_config` against PEFT's own rules, and every refusal by field name."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from slora_core.adapters.peft_config import PeftLoraConfig, parse_peft_config
from slora_core.adapters.peft_fields import INERT_FIELDS, READ_FIELDS, REFUSED_FIELDS
from slora_core.errors import InvalidAdapterError


def _parse(**fields: Any):
    return parse_peft_config(json.dumps({"peft_type": "LORA", **fields}).encode())


def _rank_and_scaling(config: PeftLoraConfig, *names: str) -> tuple[int, float]:
    """Of one module, by its names."""
    ranks = config.ranks([names])
    return ranks[0], config.scalings([names], ranks)[0]


def test_defaults_are_pefts() -> None:
    from peft import LoraConfig

    config, peft = _parse(), LoraConfig()
    assert (config.r, config.lora_alpha, config.use_rslora) == (peft.r, peft.lora_alpha, False)


def test_every_field_that_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = parse_peft_config((tmp_path / "adapter_config.json").read_bytes())
    assert _rank_and_scaling(config, "model.layers.0.self_attn.q_proj") == (4, 8.0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_match_as_in_peft(use_rslora: bool) -> None:
    from peft.utils.other import get_pattern_key

    rank_pattern = {
        "layers.1.self_attn.q_proj": 3,
        "^model.layers.0.self_attn.k_proj": 5,
        "v_proj|o_proj": 7,
        r".*\.[01]\.mlp\..*": 9,
        "proj": 11,
        "q_proj": 13,
    }
    alpha_pattern = {"self_attn.q_proj": 40, r"layers\.1\..*_proj": 0.5}
    config = _parse(
        r=2, lora_alpha=6, use_rslora=use_rslora, rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )  # fmt: skip
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    modules += ["mlp.gate_proj", "mlp.down_proj"]
    for prefix in ("model.", ""):
        for layer in (0, 1, 2, 11):
            for module in modules:
                name = f"{prefix}layers.{layer}.{module}"
                rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), name), 2)
                alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), name), 6)
                expected = alpha / math.sqrt(rank) if use_rslora else alpha / rank
                assert _rank_and_scaling(config, name) == (rank, expected), name


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ".*layers.0.*"},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"base_model_name_or_path": "some/model", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"loftq_config": {"loftq_bits": 4}},
        {"enable_lora": None, "merge_weights": False, "some_new_field": None, "another": {}},
        {"bias": None, "rank_pattern": None, "alpha_pattern": None, "use_rslora": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert _parse(**fields).r == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [1]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("fan_in_fan_out", True),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("lora_bias", True),
        ("use_qalora", True),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"x": 1}),
        ("alora_invocation_tokens", [5, 6]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "unheard_of"),
        ("init_lora_weights", 1),
        ("init_lora_weights", []),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("some_new_field", True),
        ("some_new_field", {"a": 1}),
        ("r", 0),
        ("r", -1),
        ("r", 8.0),
        ("r", True),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"(q_proj": 4}),
        ("alpha_pattern", {"q_proj": math.nan}),
        ("alpha_pattern", "q_proj"),
        ("target_modules", 3),
        ("target_modules", ["q_proj", 3]),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", True),
    ],
)
def test_refusal_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidAdapterError, match=rf"^{field}\b.* in adapter_config.json is "):
        _parse(**{field: value})


def test_every_field_of_the_installed_peft_is_known() -> None:
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= READ_FIELDS | INERT_FIELDS | REFUSED_FIELDS.keys()


def test_an_unknown_field_is_refused_with_its_writer_or_served_with_a_warning() -> None:
    fields = {"peft_type": "LORA", "peft_version": "0.99.1", "use_nova": True, "nova": None}
    data = json.dumps(fields).encode()
    with pytest.raises(InvalidAdapterError) as error:
        parse_peft_config(data)
    assert "use_nova in adapter_config.json is true" in str(error.value)
    assert "written by PEFT 0.99.1" in str(error.value)
    assert "unknown_adapter_fields: warn" in str(error.value)
    config = parse_peft_config(data, "warn")
    assert config.warnings == ("use_nova in adapter_config.json is not known and was ignored",)


def test_a_field_that_changes_the_output_is_refused_whatever_is_said_of_unknown_ones() -> None:
    data = json.dumps({"peft_type": "LORA", "use_dora": True}).encode()
    with pytest.raises(InvalidAdapterError, match="DoRA adapters are not supported"):
        parse_peft_config(data, "warn")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_backtrack_for_minutes_is_matched_at_once(field: str) -> None:
    started = time.process_time()
    config = _parse(**{field: {"([a-z_.0-9]+)+X": 4}})
    modules = [(f"model.layers.{layer}.self_attn.q_proj",) for layer in range(200)]
    assert config.ranks(modules) == [8] * 200
    assert config.scalings(modules, [8] * 200) == [1] * 200
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"(?=a)b": 4}, "without lookaround and backreferences"),
        ({"a{,3}": 4}, "otherwise than PEFT does"),
        ({"\ud800": 4}, "names of modules are ASCII"),
        ({"a" * 1025: 4}, "has 1025 characters; at most 1024"),
        ({str(index): 4 for index in range(1025)}, "it has 1025 keys; at most 1024"),
    ],
)
def test_patterns_that_are_refused(patterns: dict[str, int], reason: str) -> None:
    with pytest.raises(InvalidAdapterError) as error:
        _parse(rank_pattern=patterns)
    assert str(error.value).startswith("rank_pattern in adapter_config.json is ")
    assert reason in str(error.value)


def test_the_names_in_training_count_before_the_base_models() -> None:
    config = _parse(rank_pattern={"language_model.layers.0.mlp.up_proj": 2, "up_proj": 3})
    plain = "model.layers.0.mlp.up_proj"
    wrapped = "model.language_model.layers.0.mlp.up_proj"
    assert config.ranks([(wrapped, plain), (plain,), ("_orig_mod.nothing", plain)]) == [2, 3, 3]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"1" * 5000 + b"}", b"nope"],
    ids=["empty", "cut", "not utf-8", "deep", "long number", "word"],
)
def test_malformed_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapterError, match="not valid JSON"):
        parse_peft_config(data)


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="must hold a JSON object, not a list"):
        parse_peft_config(b"[1]")


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidAdapterError) as error:
        _parse(megatron_config=["m" * 50] * 100)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "fields",
    [
        {"\ud800": True},
        {"x" * 10**5: "y" * 10**5},
        {"rank_pattern": {"\ud800": 4}},
        {"rank_pattern": {"(" * 1000: 4}},
        {"alpha_pattern": {"q_proj" * 100: "\ud800" * 10**5}},
        {"new": True, "peft_version": "\ud800" * 10**5},
        {"target_modules": ["\ud800\n" * 10**5, 3]},
    ],
)
def test_what_a_file_holds_fits_an_answer_and_a_line_of_the_log(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidAdapterError) as error:
        _parse(**fields)
    message = str(error.value)
    assert message.isascii() and message.isprintable() and len(message) < 700


def test_a_thousand_unknown_fields_are_nine_warnings() -> None:
    fields = {"peft_type": "LORA", "\ud800" * 10**4: True}
    fields |= {f"new_{index}": True for index in range(1000)}
    warnings = parse_peft_config(json.dumps(fields).encode(), "warn").warnings
    assert len(warnings) == 9 and warnings[-1] == "so were 993 more fields"
    assert all(text.isascii() and len(text) < 300 for text in warnings)
