"""What a decoder is: its layers, a specification each, and what checkpoints call their parts.

Knows no torch and reads no files: `models.registry` makes a `ModelConfig` of a Hugging Face
directory by the file of its family. Layers of one model may differ, so nothing here speaks of
all of them but what they must share.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from slora_core.errors import UnsupportedModelError

# Linears of a layer; q, k and v, and gate and up, are each fused along their output features.
QKV, O_PROJ, GATE_UP, DOWN = "qkv", "o", "gate_up", "down"
# Norms of a layer: before attention, before the MLP, and of each head of q and of k.
INPUT_NORM, POST_NORM, Q_NORM, K_NORM = "input", "post", "q", "k"

# (in_features, out_features)
ModuleDims = tuple[int, int]


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`), names as in the Hugging Face config."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding of the first `dim` elements of a head; the rest is not turned."""

    dim: int
    theta: float = 10000.0
    scaling: Llama3RopeScaling | None = None


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotarySpec
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    # Tokens that a token sees, itself included; None is all before it.
    window: int | None = None

    @property
    def q_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class MLPSpec:
    """down(activation(gate) * up)"""

    intermediate_size: int
    bias: bool = False
    # The one that the decoder has.
    activation: str = "silu"


@dataclass(frozen=True)
class LinearSpec:
    in_features: int
    # Output features that belong together, in order: of q, k and v; of gate and up.
    parts: tuple[int, ...]
    bias: bool

    @property
    def out_features(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True)
class LayerSpec:
    """One layer: x += attention(norm(x)); x += mlp(norm(x))."""

    hidden_size: int
    attention: AttentionSpec
    mlp: MLPSpec
    norm_eps: float = 1e-6

    @property
    def linears(self) -> Mapping[str, LinearSpec]:
        attention, mlp, hidden = self.attention, self.mlp, self.hidden_size
        q_dim, kv_dim, inner = attention.q_dim, attention.kv_dim, mlp.intermediate_size
        return {
            QKV: LinearSpec(hidden, (q_dim, kv_dim, kv_dim), attention.qkv_bias),
            O_PROJ: LinearSpec(q_dim, (hidden,), attention.o_bias),
            GATE_UP: LinearSpec(hidden, (inner, inner), mlp.bias),
            DOWN: LinearSpec(inner, (hidden,), mlp.bias),
        }

    @property
    def norms(self) -> Mapping[str, int]:
        """Sizes of the layer's norms."""
        sizes = {INPUT_NORM: self.hidden_size, POST_NORM: self.hidden_size}
        if self.attention.qk_norm:
            sizes |= dict.fromkeys((Q_NORM, K_NORM), self.attention.head_dim)
        return sizes


@dataclass(frozen=True)
class Projection:
    """A matrix that a checkpoint has and adapters may change: a linear of a layer, or a part."""

    # In the layer, as Hugging Face names it: "self_attn.q_proj".
    path: str
    linear: str
    # Index of the part that it is; None where it is the whole linear.
    part: int | None = None

    def rows(self, linear: LinearSpec) -> tuple[int, int]:
        """Output features [start, end) of the linear that the matrix computes."""
        if self.part is None:
            return 0, linear.out_features
        start = sum(linear.parts[: self.part])
        return start, start + linear.parts[self.part]


@dataclass(frozen=True)
class LayerNames:
    """What a family's checkpoints call the parts of layers; a layer need not have all of them."""

    # The LoRA modules, too: in this order in an adapter's stream and every per-module array.
    # Those of one linear follow one another as its parts do.
    projections: tuple[Projection, ...]
    # (path in the layer, norm)
    norms: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, layers, norm and head."""

    vocab_size: int
    layers: tuple[LayerSpec, ...]
    names: LayerNames
    # Prompt + output, tokens: at most the shortest window, in which attention to a window is
    # attention to everything.
    max_position_embeddings: int
    # Of the last norm.
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        windows = [layer.attention.window for layer in self.layers]
        assert all(w is None or w >= self.max_position_embeddings for w in windows), windows

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].hidden_size

    @property
    def heads(self) -> tuple[int, int, int]:
        """(num_heads, num_kv_heads, head_dim) where attention is planned once for all layers.

        Raises:
            UnsupportedModelError: layers differ.
        """
        shapes = [
            (layer.attention.num_heads, layer.attention.num_kv_heads, layer.attention.head_dim)
            for layer in self.layers
        ]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise UnsupportedModelError(
                    f"layer {index} has (num_heads, num_kv_heads, head_dim) {shape} and layer 0 "
                    f"{shapes[0]}; only layers of the same attention heads are supported"
                )
        return shapes[0]

    @property
    def module_dims(self) -> tuple[tuple[ModuleDims | None, ...], ...]:
        """Of each layer and projection; None where the layer has no such matrix."""
        return tuple(
            tuple(_module_dims(layer, projection) for projection in self.names.projections)
            for layer in self.layers
        )


def _module_dims(layer: LayerSpec, projection: Projection) -> ModuleDims | None:
    linear = layer.linears.get(projection.linear)
    if linear is None:
        return None
    start, end = projection.rows(linear)
    return linear.in_features, end - start
