"""Steps that nobody sent fill what is asked for, in requests as long as may be."""

from slora_core.config import EngineConfig
from slora_core.execution.dummy_steps import num_step_pages, prompt_step
from slora_core.models.registry import load_model_config
from tests.factories import make_model


def test_prompts_share_out_the_tokens(tmp_path) -> None:
    model = load_model_config(make_model(tmp_path, "llama"))
    engine = EngineConfig(num_pool_tokens=4096, max_running_requests=3, max_model_len=100)
    plan = prompt_step(model, engine, 230, adapter_slot=5)
    assert [(chunk.start, chunk.end, chunk.slot) for chunk in plan.chunks] == [
        (0, 100, 5),
        (0, 100, 5),
        (0, 30, 5),
    ]
    assert [chunk.request.table_idx for chunk in plan.chunks] == [0, 1, 2]
    page_ids = [page for chunk in plan.chunks for page in chunk.request.page_ids]
    assert page_ids == list(range(7 + 7 + 2)) and num_step_pages(plan) == len(page_ids)


def test_no_more_prompts_than_run_at_once(tmp_path) -> None:
    model = load_model_config(make_model(tmp_path, "llama"))
    engine = EngineConfig(num_pool_tokens=4096, max_running_requests=2, max_model_len=64)
    plan = prompt_step(model, engine, 1000)
    assert [chunk.end for chunk in plan.chunks] == [64, 64]
    assert all(chunk.slot == -1 for chunk in plan.chunks)


def test_no_more_tokens_than_the_pool_holds(tmp_path) -> None:
    model = load_model_config(make_model(tmp_path, "llama"))
    engine = EngineConfig(num_pool_tokens=240, max_running_requests=8, max_model_len=100)
    plan = prompt_step(model, engine, 240)
    # The ends of the pages of two prompts are lost.
    assert [chunk.end for chunk in plan.chunks] == [100, 100, 16]
    assert num_step_pages(plan) == engine.num_pages == 15
