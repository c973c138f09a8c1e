"""Documents within a window: with `intra_document_masking`, no token sees another document than its
own.

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
    """Each token's position in its document, (B, T), int64; what lies before the window does not
    count.
    """
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    begins_BT = F.pad(ids_BT[:, :-1] == eos_id, (1, 0))  # the token after an end
    return index_T - torch.where(begins_BT, index_T, 0).cummax(dim=1).values


def boolean_mask(positions_BT: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, T): those of its own document, up to itself."""
    index_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    starts_BT = index_T - positions_BT
    return ((starts_BT[:, :, None] <= index_T) & (index_T <= index_T[:, None]))[:, None]


def block_mask(positions_BT: Tensor) -> BlockMask:
    """The same for flex_attention, which skips every block that holds no visible pair."""
    windows, tokens = positions_BT.shape
    starts_BT = torch.arange(tokens, device=positions_BT.device) - positions_BT

    def visible(window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts_BT[window, query] <= key) & (key <= query)

    return create_block_mask(
        visible, windows, None, tokens, tokens, device=positions_BT.device, BLOCK_SIZE=FLEX_BLOCK
    )


def flex_applies(model: TableFreeModel, ids_BT: Tensor) -> bool:
    """Whether this forward pass runs compiled blocks on a GPU, in a shape of flex_attention's
    kernels.

    Outside of a compiled block flex_attention would hold all scores; SDPA with a boolean mask is
    better there.
    """
    head_dim = model.config.d_model // model.config.num_heads
    compiled = model.compiled_blocks and torch.is_grad_enabled()
    return (
        compiled
        and ids_BT.is_cuda
        and ids_BT.shape[1] % FLEX_BLOCK == 0
        and head_dim >= FLEX_MIN_HEAD_DIM
    )


def hidden_states_by_document(model: TableFreeModel, ids_BT: Tensor, eos_id: int) -> Tensor:
    """Final hidden states (B, T, D) of windows in which no token sees another document."""
    positions_BT = document_positions(ids_BT, eos_id)
    mask = block_mask(positions_BT) if flex_applies(model, ids_BT) else boolean_mask(positions_BT)
    return model.hidden_states(ids_BT, positions_BT, mask)
