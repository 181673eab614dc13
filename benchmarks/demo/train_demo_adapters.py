"""Trains the five demo adapters with PEFT, measures them, and writes them for the server.

`python -m benchmarks.demo.train_demo_adapters`, on a machine with a GPU; minutes in all. Data,
order and initial weights follow from the seed. Accuracy is that of the files written: rounded to
bf16, loaded again by PEFT as any user would, asked the held-out examples in fp32.
"""

import argparse
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from app.models.demo import ensure_demo_model
from benchmarks.demo.demo_tasks import held_out_examples, messages, training_examples
from benchmarks.demo.local_accuracy import measure
from benchmarks.demo.recipes import RECIPES, Recipe
from benchmarks.demo.tasks.base import Example
from benchmarks.report import add_output_option, make_row, publish

BASE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Return prompt and answer ids, ended by the end-of-sequence token, and the prompt's length.

    The answer is tokenized apart from the prompt, as it is when a server generates it.
    """
    prompt = tokenizer.apply_chat_template(
        messages(example), add_generation_prompt=True, return_dict=False
    )
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def train(model: Any, tokenizer: Any, name: str, recipe: Recipe, seed: int) -> float:
    """Fit the adapter in `model`, with the loss on answer tokens only; return the last loss."""
    import torch
    from torch.nn import functional

    from app.progress import ProgressBar

    device = model.device
    data = [encode(tokenizer, e) for e in training_examples(name, recipe.num_examples, seed=seed)]
    rng = random.Random(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (recipe.steps - step) / recipe.steps),
    )
    language_model = model.get_base_model()
    # Uncompiled, thousands of small launches a step are the bottleneck, on a GPU as on a CPU.
    torch._dynamo.config.recompile_limit = 64
    for layer in language_model.model.layers:
        layer.compile(dynamic=False)
    model.train()
    for step in (bar := ProgressBar(range(recipe.steps), desc=f"training {name}", mininterval=5)):
        batch = [data[rng.randrange(len(data))] for _ in range(recipe.batch_size)]
        # Padded on the right: under causal attention no real token sees the padding. Few
        # different widths, because each is compiled.
        width = -(-max(len(ids) for ids, _ in batch) // 32) * 32
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        is_answer = torch.zeros((len(batch), width), dtype=torch.bool)
        for row, (ids, prompt_length) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            is_answer[row, prompt_length : len(ids)] = True
        input_ids, is_answer = input_ids.to(device), is_answer.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = language_model.model(input_ids, use_cache=False)[0]
            logits = language_model.lm_head(hidden[:, :-1][is_answer[:, 1:]])
        loss = functional.cross_entropy(logits.float(), input_ids[is_answer])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    return loss.item()


def write_adapter(model: Any, adapter_dir: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, rounded to bf16.

    Not `save_pretrained`, which adds a model card and puts the local path of the base into it.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter_dir.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL_ID
    config.inference_mode = True
    config.save_pretrained(adapter_dir)
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    weights_path = adapter_dir / "adapter_model.safetensors"
    save_file(tensors, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)


def run_task(name: str, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Train one adapter in this process and measure it; return its row of the report."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    # One process a task; more threads each would only fight over the cores.
    torch.set_num_threads(1 if args.jobs > 1 else torch.get_num_threads())
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_seed(args.seed)
    started = time.monotonic()
    model_dir = ensure_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = held_out_examples(name, args.held_out)

    def load_base() -> Any:
        # Eager attention: deterministic, and compiled as a part of the layer in training.
        model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
        return model.to(args.device)

    base = load_base()
    base_accuracy, base_sample = measure(base, tokenizer, name, examples)
    model = get_peft_model(base, recipe.lora_config())
    last_loss = train(model, tokenizer, name, recipe, args.seed)
    adapter_dir = args.out / name
    write_adapter(model, adapter_dir)
    reloaded = PeftModel.from_pretrained(load_base(), adapter_dir)
    adapter_accuracy, adapter_sample = measure(reloaded, tokenizer, name, examples)
    return {
        "task": name,
        "base_accuracy": base_accuracy,
        "adapter_accuracy": adapter_accuracy,
        "num_held_out": len(examples),
        "weights_bytes": (adapter_dir / "adapter_model.safetensors").stat().st_size,
        "last_loss": last_loss,
        "samples": {"base": base_sample, "adapter": adapter_sample},
        "wall_s": round(time.monotonic() - started, 1),
        "recipe": asdict(recipe),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("serve_configs/adapters"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=200, help="examples a task (default 200)")
    parser.add_argument("--steps", type=int, help="instead of each recipe's own, for a try")
    parser.add_argument("--jobs", type=int, default=1, help="tasks trained at once (default 1)")
    parser.add_argument("--device", default="cuda")
    add_output_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    ensure_demo_model()
    recipes = {name: RECIPES[name] for name in args.tasks}
    if args.steps is not None:
        recipes = {name: replace(recipe, steps=args.steps) for name, recipe in recipes.items()}
    # Spawned, because CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        futures = [pool.submit(run_task, name, recipe, args) for name, recipe in recipes.items()]
        rows = [future.result() for future in futures]
    print("\n| adapter | rank | base | adapter | examples | MB | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['task']} | {row['recipe']['rank']} | {row['base_accuracy']:.1%} "
            f"| {row['adapter_accuracy']:.1%} | {row['num_held_out']} "
            f"| {row['weights_bytes'] / 1e6:.2f} | {row['wall_s']:.0f} |"
        )
    config = {"device": args.device, "jobs": args.jobs}
    publish(make_row("demo_training", {"rows": rows}, config, args.seed), args.output)


if __name__ == "__main__":
    main()
