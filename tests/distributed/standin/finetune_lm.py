"""A stand-in for another project's short fine-tuning script: one argument of its Trainer names the optimizer."""

import argparse

from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from shampoo_deepspeed.integrations.trainer import ShampooFactory


class LineByLineDataset(Dataset):
    def __init__(self, path, tokenizer, block_size):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file.read().splitlines() if line]
        self.examples = tokenizer(lines, truncation=True, max_length=block_size)["input_ids"]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return {"input_ids": self.examples[index]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model_dir))
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        save_steps=args.max_steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=LineByLineDataset(args.train_file, tokenizer, block_size=16),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizer_cls_and_kwargs=(ShampooFactory, {"lr": args.learning_rate, "weight_decay": 0.1}),
    )
    trainer.train()


if __name__ == "__main__":
    main()
