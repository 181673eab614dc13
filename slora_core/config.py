"""Frozen configuration of one engine; a model's is a `models.config.ModelConfig`.

Nothing here reads files or touches a device; `memory.sizing` turns an `EngineConfig` into a number
of pages.
"""

from dataclasses import dataclass

from kernels.row_alignment import ROW_ALIGNMENT
from slora_core.models.config import ModelConfig

# Largest rank of an adapter: what the LoRA kernels are built and tested for.
MAX_RANK = 256

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    Raises:
        ValueError: a size below 1, a share out of its range, a pool of less than one page, or an
            unknown dtype.
    """

    # Device of weights and pool: "cpu" or "cuda".
    device: str = "cpu"
    # Of weights, KV and adapter pages, one of DTYPES; float32 on the CPU equals Hugging Face token
    # for token.
    dtype: str = "float32"
    # Tokens of KV a page holds. 16 keeps the unused tail of a request under 16 tokens.
    page_tokens: int = 16
    # Pool size in tokens of KV; adapters take their pages from the same pool. None, on CUDA only,
    # takes what `memory_utilization` leaves.
    num_pool_tokens: int | None = 16384
    # Share of the device's memory that weights, activations, logits and the pool may take, of
    # which the pool takes the rest; what remains is for graphs, fragmentation and other processes.
    memory_utilization: float = 0.92
    # Tokens computed in one step; a longer prompt is cut into chunks of what the budget leaves.
    max_batched_tokens: int = 512
    # Requests computed in one step.
    max_running_requests: int = 64
    # Share, from 0 to below 1, of a step's prompt tokens that the oldest prompt leaves to those
    # behind it while any wait, the shortest first. Beside them a long prompt takes up to
    # 1 / (1 - share) times as many steps as alone: 0.5 bounds that by 2, and gives short ones as
    # much. 0 is first come, first served.
    shared_prefill_fraction: float = 0.5
    # Prompt + output, tokens; None takes the model's own limit.
    max_model_len: int | None = None
    # Output tokens a request is assumed to produce when it is admitted (never more than its
    # max_tokens). Lower admits more and preempts more; None assumes max_tokens, and preempts only
    # where a prompt takes so many steps that others grow past the estimate meanwhile.
    admission_output_tokens: int | None = 256
    # Keep full pages of KV for requests of the same adapter that begin with the same tokens.
    prefix_caching: bool = True
    # On CUDA: replay steps of decodes and of short prompts as graphs, captured at start for ranks
    # up to graph_max_rank. Steps of larger ones run kernel by kernel at first, and a graph of each
    # is captured when the engine has nothing else to do; more graphs at start take longer.
    cuda_graphs: bool = True
    graph_max_rank: int = 64
    # Steps launched before the tokens of the oldest are read: 1, or 2 to plan a step while the one
    # before computes. 2 keeps a GPU busy and computes one step too many for a request that stops
    # before its max_tokens; a CPU, which plans and computes in one thread, only loses by it.
    max_inflight_steps: int = 1

    def __post_init__(self) -> None:
        sizes = {
            "page_tokens": self.page_tokens,
            "max_batched_tokens": self.max_batched_tokens,
            "max_running_requests": self.max_running_requests,
            "max_model_len": self.max_model_len,
            "graph_max_rank": self.graph_max_rank,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.max_inflight_steps not in (1, 2):
            raise ValueError(f"max_inflight_steps is {self.max_inflight_steps}; it must be 1 or 2")
        if not 0.0 <= self.shared_prefill_fraction < 1.0:
            raise ValueError(
                f"shared_prefill_fraction is {self.shared_prefill_fraction}; it must be at least 0 "
                "and below 1"
            )
        if not 0.0 < self.memory_utilization <= 1.0:
            raise ValueError(
                f"memory_utilization is {self.memory_utilization}; it must be above 0 and at most 1"
            )
        if self.num_pool_tokens is None:
            if self.device == "cpu":
                raise ValueError("num_pool_tokens must be given on the CPU; only CUDA is profiled")
        elif self.num_pool_tokens < self.page_tokens:
            raise ValueError(
                f"num_pool_tokens is {self.num_pool_tokens}; it must be at least page_tokens, "
                f"{self.page_tokens}"
            )

    def page_elems(self, model: ModelConfig) -> int:
        """Elements of one page in one layer: K and V of `page_tokens` tokens of the largest layer.

        Raises:
            ValueError: the product is not a multiple of `ROW_ALIGNMENT`.
        """
        largest = max((layer.attention for layer in model.layers), key=lambda a: a.kv_dim)
        elems = 2 * self.page_tokens * largest.kv_dim
        if elems % ROW_ALIGNMENT:
            raise ValueError(
                f"a page of {elems} elements (2 x {self.page_tokens} tokens x "
                f"{largest.num_kv_heads} KV heads x {largest.head_dim}) is not a multiple of "
                f"{ROW_ALIGNMENT}; choose a page_tokens that makes it one"
            )
        return elems

    @property
    def num_pages(self) -> int:
        assert self.num_pool_tokens is not None, "the engine sizes the pool before it is asked"
        return self.num_pool_tokens // self.page_tokens

    def context_len(self, model: ModelConfig) -> int:
        """Largest prompt + output, tokens.

        Raises:
            ValueError: max_model_len is more than the model's own limit.
        """
        limit = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > limit:
            raise ValueError(
                f"max_model_len is {self.max_model_len}; the model's limit is {limit} tokens"
            )
        return self.max_model_len or limit
