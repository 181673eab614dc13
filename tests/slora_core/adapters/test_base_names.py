"""A base model is another one only where its name plainly says so."""

import time

import pytest

from slora_core.adapters.base_names import is_other_base

SERVED = ["assistant", "/srv/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f"]


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "unsloth/Llama-3.1-8B-Instruct",
        "unsloth/llama-3.1-8b-instruct-unsloth-bnb-4bit",
        "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
        "somebody/Llama-3_1-8B-Instruct-GPTQ-Int4",
        "RedHatAI/Llama-3.1-8B-Instruct-FP8",
        "Llama-3.1-8B-Instruct",
        "Assistant",
        # A folder's name says nothing of what lies in it.
        "/home/me/models/base",
        "./checkpoint-500",
        "~/models/x",
        "out/run/merged",
        r"C:\models\x",
        "/cache/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/abc",
        "",
    ],
)
def test_the_served_model(name: str) -> None:
    assert not is_other_base(name, SERVED)


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.2-1B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "gpt2",
        "/cache/models--Qwen--Qwen2.5-7B-Instruct/snapshots/abc",
    ],
)
def test_another_model(name: str) -> None:
    assert is_other_base(name, SERVED)


def test_of_a_server_without_names_nothing_is_said() -> None:
    assert not is_other_base("Qwen/Qwen2.5-7B-Instruct", [])


@pytest.mark.parametrize(
    "name", ["-hf" * 10**6 + "x", "models--" * 10**6, "/" * 10**6, "-" * 10**6]
)
def test_a_long_name_takes_no_time(name: str) -> None:
    started = time.process_time()
    is_other_base(name, SERVED)
    assert time.process_time() - started < 0.5
