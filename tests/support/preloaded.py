"""What the process from which ranks are forked imports once, so that no rank has to."""

import gc

import pretrain.train  # noqa: F401
import support.forked_ranks  # noqa: F401
from pretrain.engine.deepspeed_library import import_muon_uncompiled

import_muon_uncompiled()  # as every rank does
gc.freeze()  # what is imported stays in every rank: none is to search it for garbage
