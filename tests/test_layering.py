"""Imports point down only, and each outside library stays in the layer that owns it."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("kernels", "slora_core", "app")

# From the bottom; a module of slora_core imports its own level and those below it. A dotted name is
# a module apart from its package.
CORE_LEVELS = [
    {
        "config",
        "models.config",
        "dtypes",
        "errors",
        "quoting",
        "requests",
        "stats",
        "stage_timer",
        "text",
        "tokenizer_files",
    },
    {"memory", "attention", "layers"},
    {"models", "adapters"},
    {"scheduling", "execution"},
    {"engine"},
]
LEVEL_OF = {name: level for level, names in enumerate(CORE_LEVELS) for name in names}

# What a layer may import beside the standard library and layers below it.
KERNEL_LIBRARIES = {"torch", "triton"}
CORE_LIBRARIES = {"torch", "safetensors", "re2"}
SERVING_LIBRARIES = {"ray", "starlette", "fastapi", "pydantic", "uvicorn"}

# The only modules that may import transformers and what comes with it.
TRANSFORMERS_MODULES = {
    "slora_core/text/tokenizer.py",
    "slora_core/text/template_sandbox.py",
    "slora_core/text/incremental_decoder.py",
    "app/models/gguf.py",
}
TRANSFORMERS_LIBRARIES = {"transformers", "jinja2", "tokenizers"}

# Distributions by what is imported of them, where the two differ.
DISTRIBUTIONS = {"grpc": "grpcio", "opentelemetry": "opentelemetry-sdk", "re2": "google-re2"}
# The only modules that may import what the extra `demo` installs.
DEMO_MODULES = {"app/models/demo.py", "app/models/gguf.py", "app/progress.py"}
# The same of the extra `otel`.
OTEL_MODULES = {"app/tracing/otel.py"}

RAY_PRIVATE = "app/ray_private.py"
# What of Ray is private without an underscore of its own; `contextvars` is Serve's current request.
PRIVATE_NAMES = {
    "on_send_request",
    "on_new_queue_len_info",
    "max_num_routing_tasks_cap",
    "routing_context",
    "should_backoff",
    "contextvars",
}


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


def test_imported_libraries_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = _distributions(project["dependencies"])
    extras = project["optional-dependencies"]
    demo, otel = _distributions(extras["demo"]), _distributions(extras["otel"])
    for package in PRODUCT:
        for path in _modules(package):
            declared = base | (demo if _name(path) in DEMO_MODULES else set())
            declared |= otel if _name(path) in OTEL_MODULES else set()
            needed = {DISTRIBUTIONS.get(library, library) for library in _libraries(path)}
            assert needed <= declared, f"{_name(path)} needs {needed - declared}: see pyproject"


def _distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def test_http_knows_no_ray() -> None:
    for path in _modules("app/http"):
        if path.name == "server.py":
            # The deployment itself.
            continue
        assert "ray" not in _libraries(path), f"{_name(path)}: app.remote_errors has Ray's errors"


def test_what_is_private_in_ray_is_used_in_one_place() -> None:
    for path in _modules("app"):
        if _name(path) != RAY_PRIVATE:
            touches = _private_touches(ast.parse(path.read_text()))
            assert not touches, f"{_name(path)} uses {touches}: put it into {RAY_PRIVATE}"
    # A guard of the guard: it sees the ones that are there.
    seen = _private_touches(ast.parse((ROOT / RAY_PRIVATE).read_text()))
    assert seen == {
        "_by_reference",
        "_check_exists",
        "_internal_kv_list",
        "_internal_kv_put",
        "__serve_build_asgi_app__",
        "ray.experimental",
        "ray.experimental.internal_kv",
        "_deployment_config",
        "ray._private",
        "ray._private.state",
        "ray._raylet",
        "ray._raylet.AuthenticationMode",
        "ray._raylet.get_authentication_mode",
        "ray.serve._private.config",
        "ray.serve._private.config.DeploymentConfig",
        "ray.serve.context._get_global_client",
        *PRIVATE_NAMES,
    }


def _private_touches(module: ast.Module) -> set[str]:
    """Names by which a module may use what Ray keeps to itself.

    An attribute with an underscore counts where it is not an object's own, since a type of Ray's
    cannot be told here; none of ours is read from outside either.
    """
    touches = set()
    for node in ast.walk(module):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(source)):
                names = [source, *(f"{source}.{alias.name}" for alias in node.names)]
            case ast.keyword(arg=str(name)) if name.startswith("_"):
                touches.add(name)
            case ast.Attribute(attr=name) if name in PRIVATE_NAMES:
                touches.add(name)
            # Named tuples have public methods of such names.
            case ast.Attribute(attr="_replace" | "_fields"):
                pass
            case ast.Attribute(value=ast.Name("self" | "cls")):
                pass
            case ast.Attribute(attr=name) if re.match("_[^_]|__serve_", name):
                touches.add(name)
            case ast.FunctionDef(name=name) if name.startswith("__serve_"):
                touches.add(name)
        for name in names:
            parts = name.split(".")
            is_rays = parts[0] == "ray" and any(
                part == "experimental" or part.startswith("_") for part in parts
            )
            if is_rays or name in PRIVATE_NAMES:
                touches.add(name)
    return touches


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


def _dotted(path: Path) -> str:
    """ "slora_core/memory/__init__.py" is the module slora_core.memory."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _paths() -> dict[str, Path]:
    """Our modules by dotted name."""
    return {_dotted(path): path for package in PRODUCT for path in _modules(package)}


@cache
def _graph() -> dict[str, set[str]]:
    """What each of our modules imports of ours; importing a module imports its packages, too."""
    paths = _paths()
    graph = {}
    for name, path in paths.items():
        # The last part of an import may be what a module defines.
        imported = set().union(*(_prefixes(target) for target in (name, *_ours(path))))
        graph[name] = imported & paths.keys() - {name}
    return graph


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def _chain(start: str, is_target: Callable[[str], bool]) -> list[str] | None:
    """The shortest chain of imports from a module to a target; None where it reaches none."""
    previous: dict[str, str | None] = {start: None}
    queue = deque([start])
    while queue:
        name: str | None = queue.popleft()
        if name != start and is_target(name):
            chain = []
            while name is not None:
                chain.append(name)
                name = previous[name]
            return chain[::-1]
        for imported in sorted(_graph()[name] - previous.keys()):
            previous[imported] = name
            queue.append(imported)
    return None


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


# What of a model has tensors or reads files; its specification is plain data.
MODEL_CODE = tuple(f"slora_core.models.{name}" for name in ("decoder", "weights", "registry"))

# From where, and where no chain of imports may lead to.
NEVER_REACHED = [
    ("kernels", ("slora_core", "app")),
    ("slora_core", ("app",)),
    ("slora_core.scheduling", ("slora_core.execution", "slora_core.engine", *MODEL_CODE)),
    ("slora_core.execution", ("slora_core.scheduling", "slora_core.engine")),
    ("slora_core.memory", ("slora_core.scheduling", "slora_core.execution", *MODEL_CODE)),
    ("slora_core.requests", ("slora_core.scheduling", "slora_core.execution", "kernels")),
    # The engine reads tokens; text is the ingress's.
    ("slora_core.engine", ("slora_core.text",)),
    # Knows neither an engine nor what one is made of.
    ("slora_core.engine.streams", ("slora_core.execution", "slora_core.scheduling", "kernels")),
]


@pytest.mark.parametrize("start,targets", NEVER_REACHED, ids=lambda x: x if type(x) is str else "")
def test_not_even_through_others(start: str, targets: tuple[str, ...]) -> None:
    modules = [name for name in _graph() if _within(name, start)]
    assert modules and all(any(_within(name, t) for name in _graph()) for t in targets)
    for module in modules:
        chain = _chain(module, lambda name: _within(name, *targets))
        assert chain is None, " imports ".join(chain)


def test_chains_are_found() -> None:
    """A guard of the guard: what does lead somewhere, and by how many steps."""
    chain = _chain("slora_core.engine.main", lambda name: name == "slora_core.memory.eviction")
    assert chain is not None and len(chain) >= 3
    assert _chain("slora_core.engine.engine", lambda name: _within(name, "slora_core.execution"))
    assert _chain("slora_core.engine.engine", lambda name: _within(name, "slora_core.scheduling"))
    assert _chain("slora_core.errors", lambda name: True) == ["slora_core.errors", "slora_core"]


def test_the_core_reaches_no_serving_library() -> None:
    """Through whichever of our modules, but for those of text, which is the ingress's."""
    unwanted = SERVING_LIBRARIES | TRANSFORMERS_LIBRARIES | {"peft"}
    owners = {_dotted(ROOT / name) for name in TRANSFORMERS_MODULES}
    needing = {name for name, path in _paths().items() if _libraries(path) & unwanted}
    assert owners <= needing
    for module in [name for name in _graph() if _within(name, "slora_core", "kernels")]:
        if not _within(module, "slora_core.text"):
            chain = [module] if module in needing else _chain(module, needing.__contains__)
            assert chain is None, " imports ".join(chain)


def test_the_scheduler_loads_no_torch() -> None:
    """Nor does anything that it imports: plans are made of plain numbers."""
    modules = [name for name in _graph() if _within(name, "slora_core.scheduling")]
    modules += ["slora_core.requests", "slora_core.config"]
    assert len(modules) > 5
    loaded = _run(
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "print(*sys.modules)\n"
    ).split()
    assert set(modules) <= set(loaded)
    assert not {"torch", "triton", "numpy", "slora_core.execution"} & set(loaded)


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
