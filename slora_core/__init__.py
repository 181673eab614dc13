"""The multi-LoRA engine: unified paging, scheduling and execution, without Ray or HTTP."""
