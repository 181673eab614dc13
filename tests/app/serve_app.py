"""A running application over a tiny random model, for the tests that need Ray."""

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.factories import make_model, make_random_adapter
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer

BASE = "base"
CONTEXT_LEN = 2048
NUM_POOL_TOKENS = 3840
PAGE_TOKENS = 16
NUM_ADAPTERS = 12
ADAPTERS = [f"adapter-{i}" for i in range(NUM_ADAPTERS)]
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tiny_model(root: Path) -> Path:
    path = root / "model"
    make_model(path, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT_LEN)
    return make_tokenizer(path)


def make_adapters(root: Path, model: Path) -> Path:
    """`NUM_ADAPTERS` adapters of mixed ranks."""
    for index, name in enumerate(ADAPTERS):
        rank = (4, 8, 16)[index % 3]
        make_random_adapter(root / "adapters" / name, model, seed=index, rank=rank)
    return root / "adapters"


@contextmanager
def running_app(base_url: str, root: Path, name: str, route_prefix: str, **settings):
    """Deploy the application over a tiny model, wait until it serves, delete it at the end."""
    from ray import serve

    from app.args import SLoRAArgs
    from app.build import application

    model = make_tiny_model(root)
    extra_dir = root / "extra"
    extra_dir.mkdir()
    args = SLoRAArgs(
        model=str(model),
        served_model_name=BASE,
        adapters_dir=str(make_adapters(root, model)),
        allowed_adapter_roots=[str(extra_dir)],
        num_pool_tokens=NUM_POOL_TOKENS,
        page_tokens=PAGE_TOKENS,
        cpus_per_replica=0.1,
        num_threads=1,
        store_capacity_bytes=2**26,
        store_extent_bytes=2**24,
        packed_cache_dir=str(root / "packed"),
        **settings,
    )
    serve.run(application(args), name=name, route_prefix=route_prefix)
    url = base_url + route_prefix.rstrip("/")
    app = RunningApp(url, model, root / "adapters", extra_dir, name)
    app.wait_replicas(args.num_replicas)
    yield app
    serve.delete(name)


@dataclass
class RunningApp:
    """What a test does to the application: requests, and a look inside."""

    url: str
    model: Path
    adapters_dir: Path
    # Another root from which adapters may be loaded.
    extra_dir: Path
    name: str = "slora"

    def complete(self, model=BASE, timeout_s=60.0, **fields):
        body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s)

    def stream(self, model=BASE, headers=None, **fields):
        """A context manager over a streamed completion that would take long to finish."""
        body = {
            "model": model,
            "prompt": "hello",
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
        url = f"{self.url}/v1/completions"
        return httpx.stream("POST", url, json=body, headers=headers, timeout=60)

    def load(self, name, path, replace=False):
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": replace}
        return httpx.post(f"{self.url}/v1/load_lora_adapter", json=body, timeout=60)

    def unload(self, name):
        return httpx.post(
            f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60
        )

    def names(self):
        cards = httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]
        return [card["id"] for card in cards]

    def is_healthy(self):
        return httpx.get(f"{self.url}/health", timeout=10).status_code == 200

    def stats(self):
        """Counters of every engine replica."""
        return self._engine().broadcast("stats").results(timeout_s=10)

    def routing_stats(self):
        """What every engine replica tells the routers."""
        return self._engine().broadcast("record_routing_stats").results(timeout_s=10)

    def check_integrity(self):
        self._engine().broadcast("check_integrity").results(timeout_s=10)

    def resident(self):
        """Ids of the adapters that some engine has in its pool."""
        return {adapter for stats in self.stats() for adapter in stats["resident_adapters"]}

    def finished(self):
        """Requests that each replica has finished."""
        return Counter({stats["replica_id"]: stats["num_finished"] for stats in self.stats()})

    def wait_idle(self, timeout_s=10.0):
        """Wait until no engine holds a request or a page of one."""

        def is_idle():
            return all(
                stats["num_running"] == stats["num_waiting"] == stats["num_kv_pages"] == 0
                for stats in self.stats()
            )

        wait_until(is_idle, timeout_s)

    def wait_replicas(self, num_replicas, timeout_s=60.0):
        """Wait until so many replicas have a living engine."""

        def are_there():
            answers = self._engine().broadcast("is_alive")
            return answers.results(timeout_s=5, return_exceptions=True) == [True] * num_replicas

        wait_until(are_there, timeout_s)

    def _engine(self):
        from ray import serve

        return serve.get_deployment_handle("engine", self.name)


def wait_until(condition, timeout_s):
    """Poll until the condition holds; what it raises counts as not yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
            problem = None
        except Exception as error:
            problem = error
        assert time.monotonic() < deadline, f"not within {timeout_s} s; last error: {problem!r}"
        time.sleep(0.1)
