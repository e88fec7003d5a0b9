"""A stand-in for another project's script, after Transformers' run_clm_no_trainer.py: accelerate and a loop of its own.

One line differs from a script for AdamW: the one that builds the optimizer.
"""

import argparse
import json
import math
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_scheduler

logger = get_logger(__name__)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config_name", required=True)
    parser.add_argument("--tokenizer_name", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_train_steps", type=int, required=True)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--lr_scheduler_type", default="linear")
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=None)
    parser.add_argument("--resume_from_checkpoint", default=None)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    config = AutoConfig.from_pretrained(args.config_name)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    model = AutoModelForCausalLM.from_config(config)
    model.gradient_checkpointing_enable()

    def group_texts(examples):
        joined = list(chain(*tokenizer(examples["text"])["input_ids"]))
        total_length = (len(joined) // args.block_size) * args.block_size
        rows = [joined[i : i + args.block_size] for i in range(0, total_length, args.block_size)]
        return {"input_ids": rows, "labels": [list(row) for row in rows]}

    data_files = {"train": args.train_file, "validation": args.validation_file}
    with accelerator.main_process_first():
        raw_datasets = load_dataset("text", data_files=data_files, cache_dir=args.output_dir)
        lm_datasets = raw_datasets.map(group_texts, batched=True, remove_columns=["text"])
    train_dataloader = DataLoader(
        lm_datasets["train"],
        shuffle=True,
        collate_fn=default_data_collator,
        batch_size=args.per_device_train_batch_size,
    )
    eval_dataloader = DataLoader(
        lm_datasets["validation"], collate_fn=default_data_collator, batch_size=args.per_device_eval_batch_size
    )

    no_decay = ["bias", "norm.weight"]
    optimizer_grouped_parameters = [
        {
            "params": [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)],
            "weight_decay": args.weight_decay,
        },
        {
            "params": [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.Shampoo(optimizer_grouped_parameters, lr=args.learning_rate)  # type: ignore[attr-defined]

    lr_scheduler = get_scheduler(
        name=args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    completed_steps = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        completed_steps = int(Path(args.resume_from_checkpoint).name.removeprefix("step_"))
        active_dataloader = accelerator.skip_first_batches(
            train_dataloader, completed_steps * args.gradient_accumulation_steps
        )
    else:
        active_dataloader = train_dataloader

    losses, rates, total = [], [], 0.0
    model.train()
    for batch in active_dataloader:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            loss = outputs.loss
            total += accelerator.gather(loss.detach().float()).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                rates.append(lr_scheduler.get_last_lr()[0])
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        completed_steps += 1
        losses.append(total / args.gradient_accumulation_steps)
        total = 0.0
        if args.checkpointing_steps and completed_steps % args.checkpointing_steps == 0:
            accelerator.save_state(str(Path(args.output_dir) / f"step_{completed_steps}"))
        if completed_steps >= args.max_train_steps:
            break

    model.eval()
    seen = []
    for batch in eval_dataloader:
        with torch.no_grad():
            outputs = model(**batch)
        seen.append(accelerator.gather_for_metrics(outputs.loss.repeat(args.per_device_eval_batch_size)))
    eval_loss = torch.cat(seen).float().mean().item()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        results = {"perplexity": math.exp(eval_loss), "eval_loss": eval_loss, "losses": losses, "rates": rates}
        (Path(args.output_dir) / "all_results.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main()
