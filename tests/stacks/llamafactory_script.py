"""LLaMA-Factory's launcher with DeepSpeed on the CPU."""

from __future__ import annotations

import runpy

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel that takes a minute to compile
deepspeed.init_distributed("gloo")  # before ZeRO-3 shards the model as it is loaded
runpy.run_module("llamafactory.launcher", run_name="__main__")
