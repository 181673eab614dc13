"""Arguments of the application, as the `args` of a Serve config file give them.

Owns names, units, defaults and the reasons for them. It starts nothing; `build` reads it.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from app.scaling_args import ScalingArgs
from slora_core.config import EngineConfig

DEMO_MODEL_NAME = "smollm2-135m-instruct"


class SLoRAArgs(ScalingArgs):
    """Every field is checked before anything starts, and an unknown one is an error."""

    model_config = ConfigDict(extra="forbid")

    # Base model: a local Hugging Face directory or a hub id. None: the demo model, which is
    # fetched on the first start and needs no GPU, hub or account.
    model: str | None = None
    # Branch, tag or commit of a hub model; None: its main branch. It is resolved to a commit when
    # the application is built, so that all replicas and their replacements serve that one.
    model_revision: str | None = None
    # Name of the base model in requests; by default the demo model's name or the last part of
    # `model`.
    served_model_name: str | None = Field(default=None, min_length=1)
    # "dummy" fills the model with random weights, for benchmarks of speed.
    load_format: Literal["safetensors", "dummy"] = "safetensors"

    # The base model's chat template: Jinja source, or a file that holds it. None: that of the
    # model's own files. Adapters may bring their own, of which a copy of that one counts as none.
    chat_template: str | None = None
    # Where temperature, top_p, top_k and min_p come from where a request is silent: "auto" is the
    # model's generation_config.json, "openai" the defaults of OpenAI's API: temperature 1, no cut.
    generation_config: Literal["auto", "openai"] = "auto"

    # Directory whose subdirectories are PEFT adapters, registered by name at start.
    adapters_dir: str | None = None
    # Directories beside `adapters_dir` from which /v1/load_lora_adapter may read. Nothing else is
    # readable through it, so that a client cannot probe the server's files.
    allowed_adapter_roots: list[str] = []
    # What becomes of an adapter whose adapter_config.json has a field with a value that no version
    # of PEFT known here writes: refused, since it may change the output, or served with a warning.
    unknown_adapter_fields: Literal["refuse", "warn"] = "refuse"
    # File that remembers adapters loaded while serving. None: the Ray cluster itself does, so that
    # a registry that dies takes up where it was, and a new cluster starts afresh.
    registry_state_path: str | None = None

    # Device of weights and pool. The CPU serves the demo and tests.
    device: Literal["cpu", "cuda"] = "cpu"
    # Weights, KV and adapters; None: float32 on the CPU, where it equals Hugging Face token for
    # token, bfloat16 on CUDA.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    # Tokens of KV a page holds; 16 keeps the unused tail of a request short.
    page_tokens: int = Field(default=16, ge=1)
    # Pool size in tokens of KV; adapters take their pages from the same pool. None: on CUDA what
    # `memory_utilization` leaves, on the CPU 24576, which holds two requests of the demo model's
    # whole context and its adapters, in 1.1 GB.
    num_pool_tokens: int | None = Field(default=None, ge=1)
    # Share of a GPU's memory for weights, activations, logits and the pool; the rest is for CUDA
    # graphs, fragmentation and other processes.
    memory_utilization: float = Field(default=0.92, gt=0.0, le=1.0)
    # Tokens computed in one step; longer prompts are cut. None: on the CPU 512, which keeps a step
    # of the demo model under a second on two cores, so that running requests go on beside a long
    # prompt; on CUDA 8192, from where on larger steps gain nothing.
    max_batched_tokens: int | None = Field(default=None, ge=1)
    # Requests computed in one step; None: 64 on the CPU, 256 on CUDA.
    max_running_requests: int | None = Field(default=None, ge=1)
    # Share of a step's prompt tokens, from 0 to below 1, that the oldest prompt leaves to those
    # behind it while any wait, the shortest first. 0.5 keeps short prompts from waiting for a long
    # one, which takes at most 1 / (1 - 0.5) = 2 times as many steps as alone; 0 is first come,
    # first served.
    shared_prefill_fraction: float = Field(default=0.5, ge=0.0, lt=1.0)
    # Prompt + output, tokens; None: the model's own limit.
    max_model_len: int | None = Field(default=None, ge=2)
    # Keep the KV of past requests, while there is room, for later ones of the same adapter that
    # begin with the same tokens: system prompts, conversations.
    prefix_caching: bool = True
    # Output tokens a request is assumed to produce when it is admitted; null assumes max_tokens.
    # 256 is more than most answers need: lower admits more at once and preempts more.
    admission_output_tokens: int | None = Field(default=256, ge=1)

    # Bytes of packed adapters kept in shared memory on each node, and the unit in which they are
    # taken. 1 GiB holds some hundred adapters of a 7B model at rank 8; 64 MiB suits small machines.
    store_capacity_bytes: int = Field(default=2**30, ge=2**20)
    store_extent_bytes: int = Field(default=2**26, ge=2**20)
    # Directory on each node's disk where registered adapters are kept in packed form: they are
    # served from there where their own files were changed or deleted since they were loaded, and
    # read faster. None: `packed` in `$SLORA_CACHE` or ~/.cache/slora. Several servers may share it.
    packed_cache_dir: str | None = None
    # Bytes of them, beyond which those go that were not used for longest; 0 keeps none. 32 GiB
    # holds 2,000 adapters of a 7B model at rank 8. None is written to a disk that is 95% full.
    packed_cache_bytes: int = Field(default=2**35, ge=0)

    # What Ray reserves for an engine replica. The CPU share is small by default because Ray only
    # counts it: the demo must start on two cores beside Serve's own actors.
    cpus_per_replica: float = Field(default=0.5, gt=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    # Threads that one engine computes with; None: the node's cores over the replicas on the CPU.
    # Ray sets OMP_NUM_THREADS to 1 in its workers, which would halve a CPU engine's speed.
    num_threads: int | None = Field(default=None, ge=1)
    # Seconds without a sign of life after which an engine is taken for hung and replaced, its
    # requests ended with an error. Signs come between steps, so it must be longer than the longest
    # step. None: on CUDA 60, a hundred times that; on the CPU 600, since a step of 512 tokens of an
    # 8B model takes minutes on a few cores.
    engine_stall_timeout_s: float | None = Field(default=None, ge=1.0)
    # Engine replicas beside those that must be replaced (another model, pool, number of GPUs), in
    # percent of num_replicas. 0: an old one gives its GPU to the new one when its streams have
    # ended, and with one replica new requests wait meanwhile; up to 100 where there is room for
    # both, so that as many serve as before.
    max_surge_percent: int = Field(default=0, ge=0, le=100)

    # Requests a replica holds, running and waiting in its engine; beyond it they wait in the
    # ingress. None: four times max_running_requests, so that the engine always finds a next one.
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    # Requests of one ingress that wait for their first token, wherever they do, and tokens of their
    # prompts; more are refused with 503 at once, so that a client can go elsewhere instead of
    # waiting for its own timeout. Of tokens, None is on the CPU 131,072, which the demo model
    # computes in some minutes, and on CUDA 1,048,576, half a minute of an 8B model's.
    max_queued_requests: int = Field(default=1024, ge=1)
    max_queued_tokens: int | None = Field(default=None, ge=1)
    # Seconds between two pieces of a streamed answer after the first. 30 ms is below what a
    # reader notices, and each piece costs about 0.4 ms of Python in the ingress.
    flush_interval_s: float = Field(default=0.03, ge=0.0, le=10.0)
    # Pieces a second that one replica sends, all streams together; where there are more streams
    # each waits longer for its next piece. HTTP costs 0.2 to 0.4 ms of Python for each in every
    # process on its way, so beyond some thousands answers would queue up behind one another.
    max_pieces_per_s: float = Field(default=2000.0, gt=0.0)
    # Seconds for which a request whose engine has ended is without one, at most, before its client
    # is told: twice what a replica of an 8B model takes to come back on a GPU with cold caches.
    failover_timeout_s: float = Field(default=120.0, ge=0.0)
    # A request leaves the replica of its adapter or conversation when that holds this many
    # requests, and more than spill_factor times the mean. 8 requests batch at little cost to each
    # other; 1.25 bounds the
    # imbalance without moving adapters at every fluctuation.
    spill_queue_len: int = Field(default=8, ge=1)
    spill_factor: float = Field(default=1.25, ge=1.0)
    # Bytes of a request body; a prompt that fills a context of 128k tokens is under 1 MiB.
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    # Seconds that a body may take to come: the largest one at 1 Mbit/s.
    body_timeout_s: float = Field(default=60.0, gt=0.0)
    # Bytes of all bodies that an ingress replica is reading, beyond 64 KiB of each; more are
    # refused with 503. Several of the largest at once, and no matter to a process of 500 MB.
    max_inflight_body_bytes: int = Field(default=64 * 2**20, ge=2**20)
    # Seconds that a replica which is stopped, by a new deployment or for want of requests, has to
    # end its streams; the longest answers take minutes.
    graceful_shutdown_timeout_s: float = Field(default=120.0, ge=0.0)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.device == "cuda" and self.gpus_per_replica == 0:
            raise ValueError("gpus_per_replica is 0 with device cuda; give each replica a GPU")
        if self.num_pool_tokens is not None and self.num_pool_tokens < self.page_tokens:
            raise ValueError(
                f"num_pool_tokens is {self.num_pool_tokens}; it must be at least page_tokens, "
                f"{self.page_tokens}"
            )
        if self.store_extent_bytes > self.store_capacity_bytes:
            raise ValueError(
                f"store_extent_bytes is {self.store_extent_bytes}; it must be at most "
                f"store_capacity_bytes, {self.store_capacity_bytes}"
            )
        return self

    @property
    def num_batched_tokens(self) -> int:
        """`max_batched_tokens`, or the device's default."""
        return self.max_batched_tokens or (512 if self.device == "cpu" else 8192)

    @property
    def num_running_requests(self) -> int:
        """`max_running_requests`, or the device's default."""
        return self.max_running_requests or (64 if self.device == "cpu" else 256)

    @property
    def num_ongoing_requests(self) -> int:
        """`max_ongoing_requests`, or the default."""
        return self.max_ongoing_requests or 4 * self.num_running_requests

    @property
    def num_queued_tokens(self) -> int:
        """`max_queued_tokens`, or the device's default."""
        return self.max_queued_tokens or (2**17 if self.device == "cpu" else 2**20)

    @property
    def stall_timeout_s(self) -> float:
        """`engine_stall_timeout_s`, or the device's default."""
        return self.engine_stall_timeout_s or (600.0 if self.device == "cpu" else 60.0)

    @property
    def base_model_name(self) -> str:
        """Name of the base model in requests."""
        if self.served_model_name is not None:
            return self.served_model_name
        return DEMO_MODEL_NAME if self.model is None else self.model.rstrip("/").split("/")[-1]

    @property
    def adapter_roots(self) -> list[str]:
        """Absolute directories from which adapters may be loaded."""
        roots = [*self.allowed_adapter_roots]
        if self.adapters_dir is not None:
            roots.append(self.adapters_dir)
        return list(dict.fromkeys(str(Path(root).expanduser().resolve()) for root in roots))

    def engine_config(self) -> EngineConfig:
        on_cpu = self.device == "cpu"
        default_dtype = "float32" if on_cpu else "bfloat16"
        return EngineConfig(
            device=self.device,
            dtype=self.dtype or default_dtype,
            page_tokens=self.page_tokens,
            num_pool_tokens=self.num_pool_tokens or (24576 if on_cpu else None),
            memory_utilization=self.memory_utilization,
            max_batched_tokens=self.num_batched_tokens,
            max_running_requests=self.num_running_requests,
            shared_prefill_fraction=self.shared_prefill_fraction,
            max_model_len=self.max_model_len,
            admission_output_tokens=self.admission_output_tokens,
            prefix_caching=self.prefix_caching,
            # A GPU is kept busy by planning a step while the one before computes.
            max_inflight_steps=1 if on_cpu else 2,
        )


def parse_args(values: dict[str, Any]) -> SLoRAArgs:
    """The arguments as a config file has them.

    Raises:
        ValueError: names every argument that is wrong, its value and what is allowed.
    """
    try:
        return SLoRAArgs.model_validate(values)
    except ValidationError as error:
        problems = [
            _problem(found["loc"], found["msg"], found["input"]) for found in error.errors()
        ]
        raise ValueError("; ".join(problems)) from None


def _problem(location: tuple[int | str, ...], message: str, value: object) -> str:
    # Those of several arguments together name them themselves.
    if not location:
        return message.removeprefix("Value error, ")
    name = ".".join(map(str, location))
    if message.startswith("Extra inputs"):
        return f"{name} is no argument of this application"
    return f"{name}: {message}, not {value!r}"
