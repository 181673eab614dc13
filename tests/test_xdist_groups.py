"""Tests that share a cluster or fixtures share a worker; those that start Ray come first."""

from tests.xdist_groups import RAY, group_of, order_of

SERVE = "tests/app/test_serve.py::test_openai_client"
E2E = "tests/e2e/test_e2e.py::test_the_commands_of_s_lora[real]"
ENGINE = "tests/slora_core/engine/test_engine.py::test_base[llama]"
KERNEL = "tests/kernels/test_silu_mul.py::test_wider_rows[a::b]"


def test_groups() -> None:
    assert group_of(SERVE) == group_of(E2E) == RAY
    assert group_of(ENGINE) == "tests/slora_core/engine/test_engine.py"
    assert group_of(KERNEL) == KERNEL


def test_order() -> None:
    assert sorted([KERNEL, ENGINE, E2E], key=order_of) == [E2E, ENGINE, KERNEL]
