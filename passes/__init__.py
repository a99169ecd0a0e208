"""The passes of graphprune, one file each; ``__all__`` is what the registry finds."""

from graphprune.passes.find_prunable import FindPrunable
from graphprune.passes.fold_conv_bn import FoldConvBn
from graphprune.passes.fold_masks import FoldMasks
from graphprune.passes.freeze_quant import FreezeQuant
from graphprune.passes.inline_blocks import InlineBlocks
from graphprune.passes.insert_fake_quant import InsertFakeQuant
from graphprune.passes.insert_masks import InsertMasks
from graphprune.passes.keep_outputs import KeepOutputs
from graphprune.passes.lock_masks import LockMasks
from graphprune.passes.partition_blocks import PartitionBlocks
from graphprune.passes.remove_dead import RemoveDead

__all__ = [
    "FindPrunable",
    "FoldConvBn",
    "FoldMasks",
    "FreezeQuant",
    "InlineBlocks",
    "InsertFakeQuant",
    "InsertMasks",
    "KeepOutputs",
    "LockMasks",
    "PartitionBlocks",
    "RemoveDead",
]
