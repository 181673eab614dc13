"""The fields of PEFT's `LoraConfig`, up to 0.21: refused, without effect, or read by `peft_config`.

A field of a later version is in none of the tables, and refused where it has a value.
"""

# Fields that change the computation or the base model, with what a user can do about it.
REFUSED_FIELDS = {
    "use_dora": "DoRA adapters are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "layer_replication": "the base model's layers cannot be replicated for one adapter",
    "fan_in_fan_out": "transposed (Conv1D) base weights are not supported",
    "megatron_config": "Megatron adapters are not supported",
    "lora_bias": "a bias in LoRA B is not supported",
    "use_qalora": "QALoRA adapters are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA is not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
}

# Fields with no effect on a trained adapter's output: provenance, training, and settings of
# options that `init_lora_weights` or a refused field would have to switch on.
INERT_FIELDS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)

READ_FIELDS = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        # The tensors say what was saved.
        "modules_to_save",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)

# Initializations that leave the base weights as they are. The others (pissa, olora, corda, loftq,
# lora_ga) subtract from them, so that such an adapter only fits a base of its own.
INERT_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
