"""The parameters of this decoder, read from another's tensors: their layout made ours, bit for bit.

Every step only moves values: rows of queries, keys and values between heads, channels of a head
for the rotary positions, channels of the residual stream for the way that a code fills the width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from data_prep.errors import UserError
from pretrain.checkpoint.reader import Fragment
from pretrain.importing.foreign import Foreign
from pretrain.importing.names import OUTPUT_BIAS, Names
from pretrain.importing.weights import WeightFiles

Matched = Mapping[str, tuple[str, ...]]  # our names -> theirs, in parts; none for zeros

# Which dimension of a parameter runs over the residual stream, by the end of its name.
RESIDUAL_ROWS = (
    "norm.weight",
    "norm.bias",
    "attention.output.weight",
    "attention.output.bias",
    "mlp.down.weight",
    "mlp.down.bias",
)
RESIDUAL_COLUMNS = ("query_key_value.weight", "mlp.up.weight", "output_projection.weight")


class ForeignParameters:
    """Parameters of ours, each read from the foreign tensors when it is asked for."""

    def __init__(self, foreign: Foreign, files: WeightFiles, names: Names, found: Matched) -> None:
        self.foreign = foreign
        self.files = files
        self.names = names
        self.found = found

    def refuse_an_output_bias(self) -> None:
        """Raise UserError for a bias of the output projection that does anything."""
        for name in self.found.get(OUTPUT_BIAS, ()):
            largest = float(self.files.read(name).abs().max())
            if largest:
                raise UserError(
                    f"{self.foreign.directory}: {name} is a bias of the output projection (up to "
                    f"{largest:.3g}), which this decoder does not have; it can't be imported"
                )

    def stored(self, ours: str) -> Tensor:
        """The tensors of a parameter, one after the other, as they are laid out there."""
        return torch.cat([self.files.read(name) for name in self.found[ours]])

    def read(self, ours: str, shape: list[int], lift: str, code_bits: int) -> Tensor:
        """A parameter in our layout, fp32; zeros where the directory has none."""
        if not self.found[ours]:
            return torch.zeros(shape)
        values = self.stored(ours)
        if "query_key_value" in ours:
            values = self.heads_in_our_order(values)
        if lift == "repeat_interleave":
            values = channels_in_our_order(ours, values, self.foreign.d_model, code_bits)
        return values.contiguous()

    def heads_in_our_order(self, values: Tensor) -> Tensor:
        """Rows of `query_key_value`: by head; channels of queries and keys as rotary halves."""
        heads = self.foreign.num_heads
        rest = values.shape[1:]
        if self.names.layout.query_key_value == "one_after_another":
            values = values.view(3, heads, -1, *rest).transpose(0, 1)
        grouped = values.reshape(heads, 3, -1, *rest).clone()
        if self.names.layout.rotary == "pairs":
            queries_and_keys = grouped[:, :2]
            evens = queries_and_keys[:, :, 0::2]
            odds = queries_and_keys[:, :, 1::2]
            grouped[:, :2] = torch.cat([evens, odds], dim=2)
        return grouped.reshape(-1, *rest)


def channels_in_our_order(ours: str, values: Tensor, width: int, code_bits: int) -> Tensor:
    """A parameter whose residual channels repeat each bit, as one whose channels repeat the code.

    LayerNorm, matrices and sums take channels in any order, so the model stays the same.
    """
    channel = torch.arange(width)
    repeats = width // code_bits
    theirs = channel % code_bits * repeats + channel // code_bits
    if ours.endswith(RESIDUAL_ROWS):
        return values[theirs]
    if ours.endswith(RESIDUAL_COLUMNS):
        return values[:, theirs]
    return values


def as_fragment(name: str, master: Tensor) -> Fragment:
    """A parameter with an optimizer that has seen nothing yet."""
    flat = master.flatten()
    # Zeros that take no memory; they are written a few MB at a time.
    nothing = torch.zeros(1).expand(flat.numel())
    states = {"master": flat, "exp_avg": nothing, "exp_avg_sq": nothing}
    return Fragment(name=name, start=0, states=states)
