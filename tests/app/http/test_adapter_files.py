"""Loads over HTTP of what people have in their files: served rightly, or a 400 that says why."""

import errno
import hashlib
import itertools
import json
import re
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.registry import inspector
from slora_core.adapters import peft_weights
from slora_core.adapters.peft_weights import read_peft_adapter
from tests.app.api_errors import error_of
from tests.app.http.adapter_world import World, load
from tests.mutations import CONFIG, MUTATIONS, WEIGHTS, mutate
from tests.mutations.files import BACKTRACKS

NUM_MUTANTS = 200
MAX_LOAD_S = 2.0
# A file, one of its tensors or of its fields.
NAMED_AT_FAULT = r"adapter_config.json|adapter_model|tensor |\w+_config.json|chat_template"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("files"), base_names=("org/base", "org/Llama-3.1-8B"))


def is_as_in_the_files(folder, geometry, adapter_id):
    """Whether an adapter's identity, weights and scaling are those of its files, read apart."""
    config, weights = ((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config + weights)
    found = read_peft_adapter(folder, geometry)[1]
    tensors = load_file(folder / WEIGHTS)
    same = [digest.hexdigest() == adapter_id, len(tensors) == 2 * len(found)]
    for name, tensor in tensors.items():
        [(layer, module, matrix)] = re.findall(r"layers\.(\d+)\..*?(\w+)\.lora_([AB])", name)
        lora = found[int(layer), geometry.module_names.index(module)]
        same.append(torch.equal(lora.a if matrix == "A" else lora.b, tensor))
        same.append(lora.scaling == pytest.approx(scaling(json.loads(config), module, lora.rank)))
    return all(same)


def scaling(config, module, rank):
    """By PEFT's rules, as far as the mutants go."""
    alpha = config.get("lora_alpha", 8)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if key != BACKTRACKS and re.match(rf"(.*\.)?({key})$", f"x.{module}"):
            alpha = value
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def test_mutated_folders_are_refused_by_name_or_served_rightly(world, caplog):
    seconds = dict.fromkeys(range(NUM_MUTANTS), 0.0)
    outcomes = {kind.__name__: [] for kind in MUTATIONS}

    async def work(client):
        good = {"model": "good", "prompt": "hi", "max_tokens": 4}
        assert (await load(client, "good", "good")).status_code == 200
        for seed in range(NUM_MUTANTS):
            folder = world.root / f"mutant-{seed}"
            what = mutate(world.good, folder, seed)
            started = time.monotonic()
            answer = await load(client, folder.name, folder.name)
            seconds[seed] = time.monotonic() - started
            outcomes[what.partition(" ")[0]].append(answer.status_code)
            if answer.status_code == 200:
                records = (await world.registry.changes_since()).records
                record = records[folder.name]
                assert is_as_in_the_files(folder, world.geometry, record.adapter_id), what
                body = {**good, "model": folder.name}
                assert (await client.post("/v1/completions", json=body)).status_code == 200, what
                assert world.engine.requests[-1].adapter_id == record.adapter_id
                await client.post("/v1/unload_lora_adapter", json={"lora_name": folder.name})
            else:
                error = error_of(answer, 400)
                assert error["param"] == "lora_path" and "internal" not in error["message"], what
                assert re.search(NAMED_AT_FAULT, error["message"]), (what, error)
                assert error["message"].isprintable() and len(error["message"]) < 1000, what
            assert (await client.post("/v1/completions", json=good)).status_code == 200, what
        cards = (await client.get("/v1/models")).json()["data"]
        assert {"base", "good"} <= {card["id"] for card in cards}

    world.run(work)
    assert max(seconds.values()) < MAX_LOAD_S, max(seconds, key=seconds.get)
    assert all("Traceback" not in record.getMessage() for record in caplog.records)
    # Some flips change a weight only, and some fields nothing; every kind was tried.
    statuses = [status for found in outcomes.values() for status in found]
    assert len(statuses) == NUM_MUTANTS and min(map(len, outcomes.values())) >= 5
    assert statuses.count(400) > NUM_MUTANTS * 0.6, outcomes
    assert statuses.count(200) > NUM_MUTANTS * 0.1, outcomes


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank_pattern": {"\ud800": 4}}, r'rank_pattern in adapter_config.json is "\ud800"'),
        ({"\ud800": True}, r"\ud800 in adapter_config.json is true: this field"),
        ({"alpha_pattern": {"[[:alpha:]]": 4}}, "reads [: and {, otherwise than PEFT does"),
        ({"alpha_pattern": {"a{,3}": 4}}, "reads [: and {, otherwise than PEFT does"),
        ({"alpha_pattern": {r"\pL": 4}}, "no regular expression of Python's re"),
        (
            {"rank_pattern": {f"([a-z_.0-9]{{0,40}}){{0,20}}X{i}": 4 for i in range(30)}},
            "too large as regular expressions",
        ),
        ({"new": "x" * (1 << 20)}, "bytes; at most 1048576 are allowed"),
    ],
)
def test_a_config_that_no_answer_could_repeat_or_no_server_bear(world, fields, told):
    started = time.process_time()
    answer = world.load("odd", world.add("odd", **fields))
    assert told in error_of(answer, 400)["message"]
    assert time.process_time() - started < MAX_LOAD_S


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_holds_nobody_up(world, field):
    folder = world.add("slow", **{field: {BACKTRACKS: 4}})
    started = time.process_time()
    assert world.load("slow", folder).status_code == 200
    assert time.process_time() - started < 0.5


def test_fields_of_the_next_peft_are_refused_or_told_by_the_argument(world, tmp_path):
    fields = {"use_nova": True, "peft_version": "0.99.1"}
    message = error_of(world.load("next", world.add("next", **fields)), 400)["message"]
    assert "use_nova in adapter_config.json is true" in message and "PEFT 0.99.1" in message
    other = World(tmp_path, unknown_fields="warn")
    answer = other.load("next", other.add("next", **fields))
    told = "use_nova in adapter_config.json is not known and was ignored"
    assert answer.status_code == 200 and answer.json()["warnings"] == [told]


def test_two_adapters_in_one_file_are_both_named(world):
    folder = world.add("two")
    tensors = {
        name.replace(".weight", ".one.weight" if "q_proj" in name else ".two.weight"): tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS)
    message = error_of(world.load("two", folder), 400)["message"]
    assert "of adapter 'one' and tensor" in message and "of adapter 'two'" in message


def renamed(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model."),
        lambda name: name.replace("model.layers", "language_model.model.layers"),
    ],
)
def test_known_wrappers_are_taken_off(world, change):
    folder = renamed(world.add("wrapped"), change)
    answer = world.load("wrapped", folder)
    assert answer.status_code == 200 and answer.json()["warnings"] == []
    expected = read_peft_adapter(world.good, world.geometry)[1]
    found = read_peft_adapter(folder, world.geometry)[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].a, expected[key].a) for key in found)


@pytest.mark.parametrize(
    ("change", "wrapper"),
    [
        (lambda name: name.replace("model.layers", "talker.model.layers"), "talker"),
        (lambda name: name.replace(".self_attn", ".block.self_attn"), "block"),
    ],
)
def test_another_wrapper_is_named(world, change, wrapper):
    answer = world.load("wrapped", renamed(world.add("wrapped"), change))
    assert f"with '{wrapper}' around or in it" in error_of(answer, 400)["message"]


def test_whole_heads_are_ignored_where_they_are_copies_or_missing(world):
    folder = world.add("whole", modules_to_save=["lm_head"])
    [told] = world.load("whole", folder).json()["warnings"]
    assert told.endswith("names lm_head, of which the file has no tensor")
    head = load_file(world.model / "model.safetensors")["lm_head.weight"]
    name = "base_model.model.lm_head.weight"
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {name: head.bfloat16().float()}, folder / WEIGHTS)
    [told] = world.load("whole", folder).json()["warnings"]
    assert told == f"{name} is a copy of the base model's and was ignored"
    trained = head.clone()
    trained[[3, 7]] += 1
    save_file(tensors | {name: trained}, folder / WEIGHTS)
    message = error_of(world.load("whole", folder), 400)["message"]
    assert f"differs from the base model's in 2 of {len(head)} rows" in message


def test_fp8_is_told(world):
    folder = world.add("fp8", dtype=torch.float8_e4m3fn)
    message = error_of(world.load("fp8", folder), 400)["message"]
    assert "fp8 adapters are not supported; supported are float32, bfloat16" in message


def test_an_adapter_of_another_base_is_served_and_everybody_is_told(world, caplog):
    folder = world.add("foreign", base_model_name_or_path="org/other-7b")
    told = "it was trained for org/other-7b; the base model here is org/base"

    async def work(client):
        answer = await load(client, "foreign", folder)
        assert answer.status_code == 200 and answer.json()["warnings"] == [told]
        return (await client.get("/v1/models/foreign")).json()

    assert world.run(work)["warnings"] == [told]
    assert told in caplog.text


@pytest.mark.parametrize(
    "trained_for",
    ["out/run/merged", "home/me/x", "/srv/x", "unsloth/Meta-Llama-3.1-8B-bnb-4bit", "Base", ""],
)
def test_an_adapter_of_this_base_or_of_a_path_is_no_warning(world, trained_for):
    folder = world.add("own", base_model_name_or_path=trained_for)
    assert world.load("own", folder).json()["warnings"] == []


def test_an_error_that_may_pass_is_503_with_a_time_to_try_again(world, monkeypatch):
    world.add("passing")

    def failing(path, flags):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(peft_weights, "_open_without_waiting", failing)
        answer = world.load("passing")
        assert "Input/output error; try again" in error_of(answer, 503)["message"]
        assert int(answer.headers["Retry-After"]) > 0
    stamps = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(inspector, "files_stamp", lambda directory: (next(stamps),))
        answer = world.load("passing")
        assert "changed while they were read; try again" in error_of(answer, 503)["message"]
    assert world.load("passing").status_code == 200


def test_an_error_that_lasts_is_a_400(world, monkeypatch):
    world.add("barred")

    def failing(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(peft_weights, "_open_without_waiting", failing)
    error = error_of(world.load("barred"), 400)
    assert error["message"].endswith("Permission denied") and error["param"] == "lora_path"
