"""The model settings of S-LoRA's commands: a base model, the ranks of its adapters, a workload.

S1, S2 and S4 are S-LoRA's (Sheng et al., 2023, section 7 and the suites of its published
benchmark) and want a GPU. Real is the demo model with the adapters that this repository ships.
"""

from dataclasses import dataclass
from typing import Any

from app.args import DEMO_MODEL_NAME
from benchmarks.lora_targets import ATTENTION
from benchmarks.serving.trace import TraceConfig

# Added to the base model's name where its weights are random.
DUMMY_SUFFIX = "-dummy"


@dataclass(frozen=True)
class Setting:
    """One row of the table; `launch_server.py` and `run_exp.py` take its name."""

    name: str
    # The base model's name in requests, with real weights.
    model_name: str
    # config.json of a base model with random weights.
    hf_config: dict[str, Any]
    # Ranks and targets of random adapters, the ranks in turn.
    ranks: tuple[int, ...]
    # Arrivals a second and for how long; the second pair is that of `--debug`.
    rate: float
    duration_s: float
    debug_rate: float
    debug_duration_s: float
    input_range: tuple[int, int] = (8, 512)
    output_range: tuple[int, int] = (8, 512)
    target_modules: tuple[str, ...] = ATTENTION
    # Whether there are real weights; otherwise it runs as a dummy only.
    has_weights: bool = False
    device: str = "cuda"

    def served_name(self, dummy: bool) -> str:
        """Name under which the base model is served, so that a client can tell settings apart."""
        return self.model_name + DUMMY_SUFFIX if dummy else self.model_name

    def trace_config(self, num_adapters: int, debug: bool, **changes: Any) -> TraceConfig:
        """The setting's workload; `changes` are fields of `TraceConfig`, None keeps ours.

        Raises:
            ValueError: as `TraceConfig`.
        """
        fields = {
            "num_adapters": num_adapters,
            "rate": self.debug_rate if debug else self.rate,
            "duration_s": self.debug_duration_s if debug else self.duration_s,
            "input_range": self.input_range,
            "output_range": self.output_range,
            "vocab_size": self.hf_config["vocab_size"],
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return TraceConfig(**{**fields, **given})


def _llama_config(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """A Llama-1 of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


LLAMA_7B = _llama_config(4096, 11008, 32, 32)
LLAMA_13B = _llama_config(5120, 13824, 40, 40)
# The demo model, so that a dummy of it needs no download.
SMOLLM2_135M = {
    **_llama_config(576, 1536, 30, 9),
    "vocab_size": 49152,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}

SETTINGS = {
    setting.name: setting
    for setting in (
        # Lengths and rates that two CPU cores keep up with.
        Setting(
            "Real",
            DEMO_MODEL_NAME,
            SMOLLM2_135M,
            ranks=(4, 8, 16, 64),
            rate=1.0,
            duration_s=120,
            debug_rate=1.0,
            debug_duration_s=25,
            input_range=(8, 64),
            output_range=(8, 32),
            has_weights=True,
            device="cpu",
        ),
        # Rates and durations of S-LoRA's table of throughput on one A100.
        Setting("S1", "llama-7b-s1", LLAMA_7B, (8,), 10, 120, 4, 25),
        Setting("S2", "llama-7b-s2", LLAMA_7B, (64, 32, 16, 8), 10, 120, 4, 25),
        Setting("S4", "llama-13b-s4", LLAMA_13B, (64, 32, 16), 10, 120, 2, 25),
    )
}
