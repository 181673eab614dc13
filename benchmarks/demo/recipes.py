"""How each of the demo adapters is shaped and trained; `train_demo_adapters` follows it."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.lora_targets import ATTENTION, MLP


@dataclass(frozen=True)
class Recipe:
    """How one adapter is shaped and trained. Together they cover what a server must take."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    learning_rate: float = 1e-3
    steps: int = 600
    batch_size: int = 32
    num_examples: int = 16_000

    def lora_config(self) -> Any:
        """PEFT's configuration of this shape."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.target_modules),
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            lora_dropout=0.0,
        )


RECIPES = {
    "date-iso": Recipe(4, 8, ATTENTION, steps=1500, batch_size=64, num_examples=24_000),
    "ticket-route": Recipe(
        8,
        16,
        ("up_proj", "down_proj"),
        use_rslora=True,
        learning_rate=5e-4,
        steps=250,
        batch_size=16,
    ),
    "order-json": Recipe(64, 64, ("q_proj", "v_proj")),
    "shop-sql": Recipe(16, 32, ATTENTION + MLP, learning_rate=5e-4, steps=320, batch_size=16),
    # Values get twice the rank, queries and keys of the first ten layers half of it.
    "measure-kv": Recipe(
        8,
        16,
        (*ATTENTION, "down_proj"),
        rank_pattern={"v_proj": 16, r"layers\.[0-9]\.self_attn\.(q|k)_proj": 4},
        alpha_pattern={"v_proj": 16},
        steps=600,
        batch_size=16,
    ),
}
