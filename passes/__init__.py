"""The passes of graphprune, one file each; ``__all__`` is what the registry finds."""

from graphprune.passes.annotate_quant import AnnotateQuant
from graphprune.passes.bias_correct import BiasCorrect
from graphprune.passes.calibrate import Calibrate
from graphprune.passes.cast_mixed import CastMixed
from graphprune.passes.dynamic_quant import DynamicQuant
from graphprune.passes.equalize import Equalize
from graphprune.passes.expand_attention import ExpandAttention
from graphprune.passes.find_prunable import FindPrunable
from graphprune.passes.fold_conv_bn import FoldConvBn
from graphprune.passes.fold_masks import FoldMasks
from graphprune.passes.freeze_quant import FreezeQuant
from graphprune.passes.fuse_epilogues import FuseEpilogues
from graphprune.passes.inline_blocks import InlineBlocks
from graphprune.passes.insert_fake_quant import InsertFakeQuant
from graphprune.passes.insert_masks import InsertMasks
from graphprune.passes.insert_observers import InsertObservers
from graphprune.passes.keep_outputs import KeepOutputs
from graphprune.passes.keep_panels import KeepPanels
from graphprune.passes.lock_masks import LockMasks
from graphprune.passes.lower_attention import LowerAttention
from graphprune.passes.pack_linear import PackLinear
from graphprune.passes.partition_blocks import PartitionBlocks
from graphprune.passes.remove_dead import RemoveDead
from graphprune.passes.remove_dropout import RemoveDropout
from graphprune.passes.remove_quant import RemoveQuant
from graphprune.passes.smooth_quant import SmoothQuant

__all__ = [
    "AnnotateQuant",
    "BiasCorrect",
    "Calibrate",
    "CastMixed",
    "DynamicQuant",
    "Equalize",
    "ExpandAttention",
    "FindPrunable",
    "FoldConvBn",
    "FoldMasks",
    "FreezeQuant",
    "FuseEpilogues",
    "InlineBlocks",
    "InsertFakeQuant",
    "InsertMasks",
    "InsertObservers",
    "KeepOutputs",
    "KeepPanels",
    "LockMasks",
    "LowerAttention",
    "PackLinear",
    "PartitionBlocks",
    "RemoveDead",
    "RemoveDropout",
    "RemoveQuant",
    "SmoothQuant",
]
