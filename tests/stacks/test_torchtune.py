"""torchtune's configuration loader builds Shampoo for a model and a schedule of its own."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from torchtune import config
from torchtune.models.llama3 import llama3
from torchtune.training import get_cosine_schedule_with_warmup

from shampoo_deepspeed import Shampoo
from tests.support.snippets import stack_block
from tests.support.stack_runs import STEPS, assert_learned, batches
from tests.support.trainings import VOCABULARY


def test_torchtune_builds_it_from_its_configuration() -> None:
    torch.manual_seed(3)
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 16}
    model = llama3(vocab_size=VOCABULARY, intermediate_dim=64, **sizes)
    optimizer = config.instantiate(OmegaConf.create(stack_block("torchtune")).optimizer, model.parameters())
    assert_recognised_by_torchtune(optimizer)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    losses, rates = [], []
    for batch in batches():
        logits = model(batch["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert_learned(losses)
    assert rates[0] == 0.0 and max(rates) == 3e-3 and rates[-1] < 3e-3
    again = config.instantiate(OmegaConf.create(stack_block("torchtune")).optimizer, model.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] and again.has_state


def assert_recognised_by_torchtune(optimizer: Shampoo) -> None:
    """Its RMSNorms are called `scale`, its head `output`."""
    policies = optimizer.policies
    assert policies["tok_embeddings.weight"].rate == "embedding_lr"
    for name in ("tok_embeddings.weight", "output.weight", "layers.0.sa_norm.scale", "norm.scale"):
        assert not policies[name].preconditioned and (name == "output.weight" or not policies[name].preconditioned)
    assert policies["layers.0.mlp.w1.weight"].preconditioned and policies["layers.1.attn.q_proj.weight"].preconditioned
