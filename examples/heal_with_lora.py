# SPDX-License-Identifier: Apache-2.0
"""Heals a pruned model: LoRA adapters learn to bring its next tokens back to the dense model's.

    pip install 'tenp[train]'
    python examples/heal_with_lora.py examples/tiny-moe pruned healed

The adapters are merged, so that the result is a pruned checkpoint like the one it came from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tenp

EXAMPLES = Path(__file__).parent


class Distiller(Trainer):
    """Trains for the teacher's distribution rather than for the text's next token.

    The text only has to be like what the model will be used on; to learn it by heart gains nothing.
    """

    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> Tensor:
        """KL of the teacher's distribution from the model's, in nats per token."""
        with torch.no_grad():
            wanted = self.teacher(**inputs).logits.float().log_softmax(-1)
        got = model(**inputs).logits.float().log_softmax(-1)
        return kl_div(got, wanted, log_target=True, reduction="sum") / inputs["input_ids"].numel()


def blocks(tokenizer: Any, files: Sequence[Path], length: int) -> list[dict[str, Tensor]]:
    """Return the text of JSON lines as blocks of `length` tokens."""
    texts = [json.loads(line)["text"] for file in files for line in file.open()]
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    return [{"input_ids": block} for block in ids[: len(ids) // length * length].split(length)]


def main() -> None:
    """Train, merge, save, and measure before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dense", help="the unpruned model, which teaches")
    parser.add_argument("pruned", help="the pruned checkpoint")
    parser.add_argument("out", type=Path, help="where the healed checkpoint goes; must not exist")
    parser.add_argument("--text", nargs="+", type=Path, help="JSON lines to train on")
    parser.add_argument("--heldout", nargs="+", type=Path, help="JSON lines to measure on")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--block", type=int, default=256, help="tokens in a training sample")
    options = parser.parse_args()
    text = options.text or sorted((EXAMPLES / "calibration").glob("*.jsonl"))
    heldout = options.heldout or sorted((EXAMPLES / "heldout").glob("*.jsonl"))
    if options.out.exists():
        parser.error(f"{options.out} must not exist")

    tokenizer = AutoTokenizer.from_pretrained(options.pruned)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options.pruned, dtype=torch.float32),
        # Attention and shared experts; the routed experts and the routers stay as they are.
        LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear"),
    )
    model.print_trainable_parameters()
    Distiller(
        model,
        TrainingArguments(
            output_dir=str(options.out.with_suffix(".trainer")),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            per_device_train_batch_size=8,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=blocks(tokenizer, text, options.block),
        teacher=AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.float32),
    ).train()
    model.merge_and_unload().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)

    for name in (options.pruned, options.out):
        print(name)
        for measured in tenp.evaluate(name, heldout, tenp.Run(), reference=options.dense):
            print(
                f"  {measured.domain}: perplexity {measured.perplexity:.3f}, "
                f"KL from dense {measured.divergence:.4g}"
            )


if __name__ == "__main__":
    main()
