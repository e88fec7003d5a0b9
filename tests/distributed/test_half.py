"""Under DeepSpeed in bf16 and fp16 all ZeRO stages take one trajectory of float32 masters."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.conftest import Ask
from tests.distributed.launch import Check
from tests.distributed.scenarios import Scenario
from tests.distributed.test_zero import SMALL_PIECES, assert_ranks_agree, deviations, final, named
from tests.zoo import relative_error
FP16 = {"fp16": {"enabled": True, "loss_scale": 1.0}}
FP32_SUM = {"data_types": {"grad_accum_dtype": "fp32"}}
SAME = {"memory_efficient_linear": False}
def pairs():
    out=[]
    for model in ("odd","wide"):
      for acc in (1, 2):
        b = Scenario(model=model, half="bf16", accumulate=acc)
        base = final(replace(b, stage=1), f"bf16_{model}_acc{acc}")
        for st in (0,2,3):
            out.append((final(replace(b, stage=st, zero=SAME if st==3 else {}), f"bf16_{model}_acc{acc}"), base))
        out.append((final(replace(b, stage=1, config=FP32_SUM), f"bf16_{model}_acc{acc}_sum"), base))
        b = Scenario(model=model, half="fp16", accumulate=acc, config=FP16)
        base = final(replace(b, stage=1), f"fp16_{model}_acc{acc}")
        for st in (0,2,3):
            out.append((final(replace(b, stage=st, zero=SAME if st==3 else {}), f"fp16_{model}_acc{acc}"), base))
    return out

@pytest.mark.parametrize("check, baseline", pairs(), ids=lambda c: c.name)
def test_h(check, baseline, ask):
    a, b = ask(check), ask(baseline)
    assert_ranks_agree(a)
    d = deviations(a[0], b[0]); w=max(d,key=d.get); print(check.name, w, d[w])
    assert d[w] <= 1e-5
