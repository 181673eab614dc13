"""Imports point down only, and each outside library stays in the layer that owns it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("kernels", "slora_core", "app")

# From the bottom; a module of slora_core imports its own level and those below it. A dotted name is
# a module apart from its package.
CORE_LEVELS = [
    {"config", "models.config", "dtypes", "errors", "requests", "stats", "stage_timer", "text"},
    {"memory", "attention", "layers"},
    {"models", "adapters"},
    {"scheduling", "execution"},
    {"engine"},
]
LEVEL_OF = {name: level for level, names in enumerate(CORE_LEVELS) for name in names}

# What a layer may import beside the standard library and layers below it.
KERNEL_LIBRARIES = {"torch", "triton"}
CORE_LIBRARIES = {"torch", "safetensors"}
SERVING_LIBRARIES = {"ray", "starlette", "fastapi", "pydantic", "uvicorn"}

# The only modules that may import transformers and what comes with it.
TRANSFORMERS_MODULES = {"slora_core/text/tokenizer.py", "app/models/gguf.py"}
TRANSFORMERS_LIBRARIES = {"transformers", "jinja2", "tokenizers"}


def _modules(package: str) -> list[Path]:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package} is empty"
    return paths


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a module imports, in functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            yield node.module
            # `from slora_core import engine` imports a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _libraries(path: Path) -> set[str]:
    """Top-level packages a module imports that are neither ours nor the standard library's."""
    top = {name.split(".")[0] for name in _imports(path)}
    return top - sys.stdlib_module_names - set(PRODUCT)


def _ours(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in PRODUCT}


def _core_part(name: str) -> str | None:
    """ "slora_core.memory.page_pool" is of "memory"; None for what is not slora_core's."""
    parts = name.split(".")
    if parts[0] != "slora_core" or len(parts) == 1:
        return None
    apart = ".".join(parts[1:3])
    return apart if apart in LEVEL_OF else parts[1]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", PRODUCT)
def test_packages_import_only_lower_ones(package: str) -> None:
    allowed = PRODUCT[: PRODUCT.index(package) + 1]
    for path in _modules(package):
        for name in _ours(path):
            assert name.split(".")[0] in allowed, f"{_name(path)} imports {name}"
        assert not _libraries(path) & {"tests", "benchmarks"}, _name(path)


def test_kernels_need_torch_and_triton_only() -> None:
    for path in _modules("kernels"):
        assert _libraries(path) <= KERNEL_LIBRARIES, _name(path)
    assert not _libraries(ROOT / "kernels" / "__init__.py")


def test_the_core_needs_no_serving_library() -> None:
    for path in _modules("slora_core"):
        allowed = CORE_LIBRARIES | (
            TRANSFORMERS_LIBRARIES if _name(path) in TRANSFORMERS_MODULES else set()
        )
        assert _libraries(path) <= allowed, _name(path)


def test_transformers_is_read_in_two_places() -> None:
    for package in PRODUCT:
        for path in _modules(package):
            if "transformers" in _libraries(path):
                assert _name(path) in TRANSFORMERS_MODULES, _name(path)
            assert "peft" not in _libraries(path), _name(path)


def test_serving_libraries_are_used_where_they_are_allowed() -> None:
    """A guard of the guards: the parser sees these imports at all."""
    seen = set().union(*(_libraries(path) for path in _modules("app")))
    assert {"ray", "starlette", "pydantic"} <= seen & SERVING_LIBRARIES


def test_levels_of_the_core() -> None:
    for path in _modules("slora_core"):
        part = _core_part(_name(path).removesuffix(".py").replace("/", "."))
        if part == "__init__":
            assert not set(_imports(path)), "the package imports nothing by itself"
            continue
        assert part in LEVEL_OF, f"give {_name(path)} a level in CORE_LEVELS"
        for name in _ours(path):
            target = _core_part(name)
            if target is None:
                continue
            assert target in LEVEL_OF, f"{_name(path)} imports {name}, which has no level"
            assert LEVEL_OF[target] <= LEVEL_OF[part], f"{_name(path)} imports {name} from above"


def test_scheduling_and_execution_do_not_know_each_other() -> None:
    for part, other in (("scheduling", "execution"), ("execution", "scheduling")):
        for path in _modules(f"slora_core/{part}"):
            assert other not in {_core_part(name) for name in _ours(path)}, _name(path)
    # The scheduler never touches tensors.
    for path in _modules("slora_core/scheduling"):
        assert "torch" not in _libraries(path), _name(path)


def _run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_transformers_works_beside_our_kernels_package() -> None:
    """transformers probes a package of the name `kernels`, and finds ours."""
    loaded = _run(
        "import sys, kernels\n"
        "assert kernels.__version__\n"
        "assert not {'torch', 'triton', 'transformers'} & set(sys.modules)\n"
        "import transformers\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8)\n"
        "config = LlamaConfig(**shape, num_attention_heads=1, num_key_value_heads=1)\n"
        "AutoModelForCausalLM.from_config(config)\n"
        "print(kernels.__file__)\n"
    )
    assert Path(loaded.strip()) == ROOT / "kernels" / "__init__.py"


def test_reading_a_models_config_loads_no_torch() -> None:
    loaded = _run(
        "import sys, slora_core.config, slora_core.models.registry\n"
        "print(*(m for m in sys.modules if '.' not in m))"
    )
    assert not {"torch", "triton", "safetensors", "transformers"} & set(loaded.split())


def test_the_engine_loads_neither_serving_libraries_nor_transformers() -> None:
    loaded = _run(
        "import sys, slora_core.engine.engine\nprint(*(m for m in sys.modules if '.' not in m))"
    )
    unwanted = SERVING_LIBRARIES | {"transformers", "app"}
    assert not unwanted & set(loaded.split())
