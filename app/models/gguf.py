"""Turns a GGUF file of the Llama family into a normal Hugging Face directory in fp32.

Knows GGUF's names, its row order for rotary embeddings and its byte-level BPE tokenizers as
SmolLM2 uses them; nothing else of GGUF. Called by `app.models.demo`, once for each cache folder.
"""

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Hugging Face's name of a special token to GGUF's.
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def convert_gguf(gguf_path: Path, model_dir: Path) -> None:
    """Write weights, configs, tokenizer and chat template of `gguf_path` into `model_dir`."""
    reader = GGUFReader(gguf_path)
    _write_weights(reader, model_dir)
    _write_config(reader, model_dir)
    _write_tokenizer(reader, model_dir)


def _write_weights(reader: GGUFReader, model_dir: Path) -> None:
    """Write model.safetensors: every tensor dequantized to fp32, under its Hugging Face name.

    The input embedding is the output projection too (tied) and is stored once.
    """
    num_heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in num_heads:
            weight = _unpermute_rotary(weight, _read(reader, f"llama.attention.{num_heads[part]}"))
        tensors[_hugging_face_name(tensor.name)] = weight
    path = model_dir / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes the file private; the folder may be shared.
    path.chmod(0o644)


def _unpermute_rotary(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo GGUF's row order for rotary embeddings.

    GGUF keeps the two rows that rotate together side by side, [heads, head_dim / 2, 2, in];
    Hugging Face keeps them half a head apart, [heads, 2, head_dim / 2, in].
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _hugging_face_name(gguf_name: str) -> str:
    if not gguf_name.startswith("blk."):
        return TENSOR_NAMES[gguf_name]
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSOR_NAMES[part]}.weight"


def _write_config(reader: GGUFReader, model_dir: Path) -> None:
    """Write config.json and generation_config.json."""
    special_ids = {
        f"{name}_token_id": _read(reader, f"tokenizer.ggml.{gguf_name}_token_id")
        for name, gguf_name in SPECIAL_TOKENS.items()
        if name != "unk"
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=_read(reader, "llama.vocab_size"),
        hidden_size=_read(reader, "llama.embedding_length"),
        intermediate_size=_read(reader, "llama.feed_forward_length"),
        num_hidden_layers=_read(reader, "llama.block_count"),
        num_attention_heads=_read(reader, "llama.attention.head_count"),
        num_key_value_heads=_read(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_read(reader, "llama.context_length"),
        # 1e-5 in the original; GGUF gives the nearest fp32 value with its tail of digits.
        rms_norm_eps=round(_read(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _read(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=True,
        **special_ids,
    )
    config.save_pretrained(model_dir)
    GenerationConfig(**special_ids).save_pretrained(model_dir)


def _write_tokenizer(reader: GGUFReader, model_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Built here rather than by transformers, whose GGUF reader takes the wrong end-of-sequence token
    and leaves out the split into single digits that SmolLM2's tokenizer was trained with.
    """
    tokens: list[str] = _read(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _read(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _read(reader, "tokenizer.ggml.merges")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split_digits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    special_tokens = {
        f"{name}_token": tokens[_read(reader, f"tokenizer.ggml.{gguf_name}_token_id")]
        for name, gguf_name in SPECIAL_TOKENS.items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_read(reader, "tokenizer.chat_template"),
        model_max_length=_read(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
    tokenizer.save_pretrained(model_dir)


def _read(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()
