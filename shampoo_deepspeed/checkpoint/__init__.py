"""save_shampoo and load_shampoo: sharded state from which any world size and any framework can resume.

A checkpoint is a folder with ``manifest.json`` and one ``data-<id>`` folder. Tensors are written first. The manifest,
put in place by one rename, completes the save. Only then is the data of an earlier save removed.
"""

from shampoo_deepspeed.checkpoint.async_writer import wait_for_saves
from shampoo_deepspeed.checkpoint.load import LoadReport, load_shampoo
from shampoo_deepspeed.checkpoint.save import save_shampoo

__all__ = ["LoadReport", "load_shampoo", "save_shampoo", "wait_for_saves"]
