"""A text of one line, a tokenizer of its words and a tiny model's configuration, in the files that scripts read."""

from __future__ import annotations

from pathlib import Path

LINE = "shampoo keeps one factor matrix per side of a weight and divides its gradient by their roots"


def prepare(folder: Path) -> None:
    """Write `text.txt` and the folder `model`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    (folder / "text.txt").write_text("\n".join([LINE] * 120))
    vocabulary = {word: i for i, word in enumerate(["?", *dict.fromkeys(LINE.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder / "model")
    LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder / "model")  # fmt: skip


def other_line() -> str:
    """The words of the text in reverse: a model that learns the text becomes worse at these."""
    return " ".join(reversed(LINE.split()))


def save_lines(folder: Path) -> None:
    """Write `other.txt`, a folder `lines` with both texts as a data set, and let the tokenizer end and pad texts."""
    import json

    from transformers import AutoTokenizer

    (folder / "other.txt").write_text("\n".join([other_line()] * 24))
    (folder / "lines").mkdir()
    for split, line, rows in (("train", LINE, 120), ("test", other_line(), 24)):
        (folder / "lines" / f"{split}.jsonl").write_text((json.dumps({"text": line}) + "\n") * rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder / "model")


def save_weights(folder: Path) -> None:
    """Add the weights of a fresh model to the folder `model`, for scripts that start from a trained one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    model.save_pretrained(folder / "model")
