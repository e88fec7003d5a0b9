"""What this adapter uses of DeepSpeed's objects, as types: DeepSpeed has no annotations of its own.

``docs/internals.md`` says where each of these is upstream. Nothing here is imported when a program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer


class Offload(Protocol):
    """``offload_optimizer`` or ``offload_param`` of a ZeRO configuration; only the former has a ratio."""

    device: object
    ratio: float


class ZeroConfig(Protocol):
    """``zero_optimization`` of a configuration."""

    stage: int
    offload_optimizer: Offload | None
    offload_param: Offload | None


class EngineConfig(Protocol):
    """A DeepSpeedConfig."""

    zero_config: ZeroConfig


class ZeroOptimizer(Protocol):
    """A wrapper of an optimizer: ZeRO-3's, and the last three those of ZeRO-1 and ZeRO-2."""

    fp32_partitioned_groups_flat: Sequence[Tensor]
    fp16_groups: Sequence[Sequence[ZeroParameter]]
    grad_position: Mapping[int, Sequence[int]]
    bit16_groups: Sequence[Sequence[Tensor]]
    averaged_gradients: Mapping[int, Sequence[Tensor | None] | None]
    single_partition_of_fp32_groups: Sequence[Tensor]
    persistent_parameters: Sequence[ZeroParameter]

    def get_param_id(self, parameter: ZeroParameter) -> int: ...
    def update_lp_params(self) -> None: ...
    def invalidate_secondary_tensor(self) -> None: ...
    def _partition_all_parameters(self) -> None: ...
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


class Engine(Protocol):
    """A DeepSpeedEngine whose inner optimizer is ours."""

    module: nn.Module
    optimizer: ZeroOptimizer
    basic_optimizer: BlockOptimizer
    client_optimizer: object
    global_steps: int
    pipeline_parallelism: bool
    seq_data_parallel_group: dist.ProcessGroup
    expert_data_parallel_group: Mapping[str, dist.ProcessGroup]
    save_checkpoint: Callable[..., object]
    load_checkpoint: Callable[..., tuple[str | None, object]]  # the path of the loaded file, or None; and more
    _config: EngineConfig

    def optimizer_params(self) -> Mapping[str, object] | None: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_compute_grad_norm(self) -> bool: ...
    def zero_elastic_checkpoint(self) -> bool: ...
    def zero_round_robin_gradients(self) -> bool: ...
    def load_universal_checkpoint(self) -> bool: ...
    def torch_autocast_enabled(self) -> bool: ...
    def torch_autocast_dtype(self) -> torch.dtype: ...
    def autotp_size(self) -> int: ...


class ZeroPartition(Protocol):
    """``ds_tensor`` of a parameter under ZeRO-3: this rank's part of it."""

    ds_numel: int

    def detach(self) -> Tensor: ...


class FlatZeroParameter(Protocol):
    """A parameter of the model under ZeRO-1 and ZeRO-2: a view of a flat buffer."""

    _dp_group: dist.ProcessGroup
    _hp_mapping: Fragment | None  # None if no element of it has its master on this rank
    requires_grad: bool

    def numel(self) -> int: ...
    def detach(self) -> Tensor: ...
    def storage_offset(self) -> int: ...
    def untyped_storage(self) -> torch.UntypedStorage: ...


class ExpertParameter(Protocol):
    """A parameter of one of DeepSpeed's experts."""

    group_name: str


class ZeroParameter(Protocol):
    """A parameter of the model under ZeRO-3."""

    ds_numel: int
    ds_tensor: ZeroPartition
    ds_process_group: dist.ProcessGroup

    def all_gather(self, parameters: Sequence[ZeroParameter]) -> None: ...


class Address(Protocol):
    """A range of a flattened tensor."""

    start: int
    numel: int


class Fragment(Protocol):
    """``_hp_mapping`` of a parameter: where its flat state and its master are."""

    lp_fragment_address: Address
    hp_fragment: Tensor | None
    optim_fragment: MutableMapping[str, Tensor] | None
