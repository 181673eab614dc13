"""Accuracy of a transformers or PEFT model in this process, on examples of the demo's tasks.

`train_demo_adapters` measures what it has trained by it; `eval_demo_adapters` asks a server.
"""

from typing import Any

from benchmarks.demo.demo_tasks import TASKS, check, messages
from benchmarks.demo.tasks.base import Example


def generate_answers(
    model: Any, tokenizer: Any, examples: list[Example], max_new_tokens: int
) -> list[str]:
    """Answer each example by greedy generation, in batches."""
    import torch

    model.eval()
    answers: list[str] = []
    for start in range(0, len(examples), 64):
        prompts = [
            tokenizer.apply_chat_template(messages(e), tokenize=False, add_generation_prompt=True)
            for e in examples[start : start + 64]
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            outputs = model.generate(
                **inputs.to(model.device), do_sample=False, max_new_tokens=max_new_tokens
            )
        new_ids = outputs[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return answers


def measure(model: Any, tokenizer: Any, name: str, examples: list[Example]) -> tuple[float, str]:
    """Return the share of right answers, and the first answer as a sample."""
    answers = generate_answers(model, tokenizer, examples, TASKS[name].max_answer_tokens)
    num_right = sum(check(name, *pair) for pair in zip(answers, examples, strict=True))
    return num_right / len(examples), answers[0]
