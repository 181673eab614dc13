import pytest
from pydantic import ValidationError

from app.args import SLoRAArgs, parse_args


def test_defaults_are_the_demo():
    args = SLoRAArgs()
    assert args.base_model_name == "smollm2-135m-instruct"
    assert args.engine_config().dtype == "float32"
    assert args.adapter_roots == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_pool_token": 5}, "num_pool_token"),
        ({"num_pool_tokens": "many"}, "num_pool_tokens"),
        ({"num_pool_tokens": 8}, "page_tokens"),
        ({"page_tokens": 0}, "page_tokens"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "cuda"}, "gpus_per_replica"),
        ({"spill_factor": 0.5}, "spill_factor"),
        ({"flush_interval_s": -1}, "flush_interval_s"),
        ({"shared_prefill_fraction": 1}, "shared_prefill_fraction"),
        ({"shared_prefill_fraction": -0.1}, "shared_prefill_fraction"),
        ({"max_pieces_per_s": 0}, "max_pieces_per_s"),
        ({"engine_stall_timeout_s": 0}, "engine_stall_timeout_s"),
        ({"store_capacity_bytes": 2**20, "store_extent_bytes": 2**21}, "store_extent_bytes"),
        ({"served_model_name": ""}, "served_model_name"),
        ({"min_replicas": 0}, "min_replicas is 0 without max_replicas"),
        ({"max_replicas": 1, "num_replicas": 2}, "num_replicas is 2; .* from min_replicas, 2, to"),
        ({"max_replicas": 4, "min_replicas": 2}, "num_replicas is 1; .*, 2, to max_replicas, 4"),
        ({"max_ingress_replicas": 1, "num_ingress_replicas": 2}, "max_ingress_replicas is 1"),
    ],
)
def test_a_wrong_field_is_named(fields, named):
    with pytest.raises(ValidationError, match=named):
        SLoRAArgs(**fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "meta-llama/Llama-3.1-8B"}, "Llama-3.1-8B"),
        ({"model": "/models/mine/"}, "mine"),
        ({"model": "/models/mine", "served_model_name": "base"}, "base"),
    ],
)
def test_name_of_the_base_model(fields, name):
    assert SLoRAArgs(**fields).base_model_name == name


def test_engine_config_takes_every_setting():
    config = SLoRAArgs(
        device="cuda", gpus_per_replica=1, page_tokens=32, num_pool_tokens=64, max_model_len=10
    ).engine_config()
    assert (config.device, config.dtype, config.page_tokens) == ("cuda", "bfloat16", 32)
    assert (config.num_pages, config.max_model_len) == (2, 10)


def test_a_gpu_has_defaults_of_its_own():
    gpu = SLoRAArgs(device="cuda", gpus_per_replica=1, memory_utilization=0.5)
    config = gpu.engine_config()
    assert config.num_pool_tokens is None and config.memory_utilization == 0.5
    assert (config.max_batched_tokens, config.max_running_requests) == (8192, 256)
    assert (gpu.num_ongoing_requests, gpu.stall_timeout_s) == (1024, 60)
    assert SLoRAArgs().stall_timeout_s == 600
    assert SLoRAArgs(engine_stall_timeout_s=5).stall_timeout_s == 5
    cpu = SLoRAArgs().engine_config()
    assert (cpu.num_pages, cpu.max_batched_tokens, cpu.max_running_requests) == (1536, 512, 64)
    assert cpu.shared_prefill_fraction == config.shared_prefill_fraction == 0.5
    assert SLoRAArgs(shared_prefill_fraction=0).engine_config().shared_prefill_fraction == 0
    assert SLoRAArgs(max_running_requests=10, max_ongoing_requests=5).num_ongoing_requests == 5


def test_adapter_roots_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SLoRAArgs(adapters_dir="a", allowed_adapter_roots=["/b"])
    assert args.adapter_roots == ["/b", str(tmp_path / "a")]


def test_what_is_wrong_is_told_in_words():
    with pytest.raises(ValueError) as told:
        parse_args({"num_replicas": 0, "nonsense": 3, "dtype": "int8"})
    assert str(told.value) == (
        "num_replicas: Input should be greater than or equal to 1, not 0; "
        "dtype: Input should be 'float32', 'bfloat16' or 'float16', not 'int8'; "
        "nonsense is no argument of this application"
    )
    with pytest.raises(ValueError, match="^num_pool_tokens .*page_tokens"):
        parse_args({"num_pool_tokens": 8})
    assert parse_args({"num_replicas": 2}) == SLoRAArgs(num_replicas=2)
