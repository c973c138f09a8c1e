"""Documents within a window, where no token is to see another (`intra_document_masking`).

A window is cut from a stream of documents, each of which ends with the end-of-document id; it may
begin and end in the middle of one. Positions restart at each document, so that its hidden states
are those of the document alone.

Tensor legend: B windows, T tokens, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pretrain.modeling_tablefree import TableFreeModel

FLEX_BLOCK = 128  # tokens to a side of the blocks that flex_attention computes or skips
FLEX_MIN_HEAD_DIM = 16


def document_positions(ids_BT: Tensor, eos_id: int) -> Tensor:
    """Each token's position in its document, (B, T), int64.

    What lies before the window does not count.
    """
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    ends_BT = ids_BT[:, :-1] == eos_id
    begins_BT = F.pad(ends_BT, (1, 0))  # the token after an end
    begin_at_BT = torch.where(begins_BT, index_T, 0)
    # The last begin up to each token; what the window begins with is taken to begin there.
    starts_BT = begin_at_BT.cummax(dim=1).values  # of the document that a token is in
    return index_T - starts_BT


def boolean_mask(positions_BT: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, T): those of its own document, up to itself."""
    keys_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    queries_T1 = keys_T[:, None]
    starts_BT = keys_T - positions_BT
    in_document_BTT = starts_BT[:, :, None] <= keys_T
    visible_BTT = in_document_BTT & (keys_T <= queries_T1)
    return visible_BTT[:, None]


def block_mask(positions_BT: Tensor) -> BlockMask:
    """The same for flex_attention, which skips every block that holds no visible pair."""
    windows, tokens = positions_BT.shape
    device = positions_BT.device
    starts_BT = torch.arange(tokens, device=device) - positions_BT

    def visible(window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = starts_BT[window, query]
        return (start <= key) & (key <= query)

    return create_block_mask(
        visible, windows, None, tokens, tokens, device=device, BLOCK_SIZE=FLEX_BLOCK
    )


def flex_applies(model: TableFreeModel, ids_BT: Tensor) -> bool:
    """Whether this forward pass runs compiled blocks on a GPU, in a shape that flex_attention has.

    Outside of a compiled block flex_attention would hold all scores; SDPA with a boolean mask is
    better there.
    """
    head_dim = model.config.d_model // model.config.num_heads
    runs_compiled = model.compiled_blocks and torch.is_grad_enabled()
    fits_kernel = ids_BT.shape[1] % FLEX_BLOCK == 0 and head_dim >= FLEX_MIN_HEAD_DIM
    return runs_compiled and ids_BT.is_cuda and fits_kernel


def hidden_states_by_document(model: TableFreeModel, ids_BT: Tensor, eos_id: int) -> Tensor:
    """Final hidden states (B, T, D) of windows in which no token sees another document."""
    positions_BT = document_positions(ids_BT, eos_id)
    build_mask = block_mask if flex_applies(model, ids_BT) else boolean_mask
    mask = build_mask(positions_BT)
    return model.hidden_states(ids_BT, positions_BT, mask)
