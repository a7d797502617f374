"""EMR: elect one unified task vector, and keep of each expert the mask and the factor that lead back to it."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from projector.algebra.linalg import widened
from projector.method import Contribution, Method, State, Sums, Totals
from projector.spec import TensorSpec

SIGNS_PER_BYTE = 4
POSITIVE, NEGATIVE = 1, 2


@dataclass(frozen=True)
class Emr(Method):
    """Takes the sign of the experts' sum, and the largest magnitude of that sign among them.

    An expert's view masks the unified vector to where the expert agrees with its sign, and rescales it to the expert's
    own sum of magnitudes. For that the signs of every expert are kept, in 2 bits for each weight of a matrix, and each
    row's sum of magnitudes, 8 bytes: unlike the state, THESE RECORDS GROW WITH THE EXPERTS, by about a sixteenth of a
    float32 model with each. Rows share no byte, so a vector, whose rows are single weights, takes 9 bytes for each.
    Where the sum of the experts is zero, so is the unified vector.

    Two experts that pull a weight in opposite directions: the stronger one wins, and the other's view leaves it out.

    >>> spec, emr = TensorSpec("w", (2,), torch.float32), Emr()
    >>> state = {"S": torch.zeros(2, dtype=torch.float64), "high": torch.zeros(2), "low": torch.zeros(2)}
    >>> stream, records, base = [torch.tensor([4.0, 1.0]), torch.tensor([-1.0, 3.0])], [], torch.zeros(2)
    >>> for t, delta in enumerate(stream, start=1):
    ...     state, _ = emr.update(state, delta, spec, Contribution(t))
    ...     records.append(emr.keep(delta, spec, Contribution(t)))
    >>> emr.read(base, state, Totals(2), spec)
    tensor([4., 3.])
    >>> for record in records:
    ...     print(emr.view(base, state, record, emr.view_sums(state, record, spec), spec))
    tensor([2.8571, 2.1429])
    tensor([0., 4.])
    """

    name = "emr"
    formula = "base + sign(S) * max |tau_i| of that sign; view i: base + rescale_i * mask_i * that"
    paper = "Huang et al., EMR-Merging, arXiv 2405.17461"
    order_independent = True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """S is float64: where experts cancel out, the order in which it was rounded would decide its sign."""
        magnitude = TensorSpec(spec.name, spec.shape, torch.float32)
        return {"S": TensorSpec(spec.name, spec.shape, torch.float64), "high": magnitude, "low": magnitude}

    def keeps(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        rows = spec.shape[0] if spec.shape else 1
        packed = -(-spec.row_numel // SIGNS_PER_BYTE)
        return {
            "signs": TensorSpec(spec.name, (rows, packed), torch.uint8),
            "magnitude": TensorSpec(spec.name, (rows,), torch.float64),
        }

    @property
    def grows(self) -> bool:
        return True

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def workspace(self, spec: TensorSpec) -> int:
        return 4 * spec.numel * 4

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {
            "S": state["S"] + delta,
            "high": torch.maximum(state["high"], delta),
            "low": torch.minimum(state["low"], delta),
        }, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return base + _unified(state)

    def keep(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        rows = _rows(delta)
        return {"signs": pack(rows), "magnitude": rows.abs().sum(dim=1, dtype=torch.float64)}

    def view_sums(self, state: State, record: State, spec: TensorSpec) -> Sums:
        agreed = _agreed(_unified(state), record["signs"])
        return {
            "magnitude": float(record["magnitude"].sum()),
            "agreed": float(agreed.abs().sum(dtype=torch.float64)),
        }

    def view(self, base: Tensor, state: State, record: State, sums: Sums, spec: TensorSpec) -> Tensor:
        rescale = sums["magnitude"] / sums["agreed"] if sums["agreed"] else 0.0
        return torch.add(widened(base), _agreed(_unified(state), record["signs"]), alpha=rescale)


def _unified(state: State) -> Tensor:
    """The largest of the values that have the sign of S; 0 where S is."""
    found = torch.where(state["S"] < 0, state["low"], state["high"])
    return found.masked_fill_(state["S"] == 0, 0.0)


def _agreed(unified: Tensor, signs: Tensor) -> Tensor:
    """What of the unified vector has the expert's sign; 0 elsewhere."""
    rows = _rows(unified)
    kept = unpack(signs, rows.shape[1])
    agrees = ((rows > 0) & (kept == POSITIVE)) | ((rows < 0) & (kept == NEGATIVE))
    return torch.where(agrees, rows, 0.0).reshape(unified.shape)


def _rows(x: Tensor) -> Tensor:
    """Any tensor as (rows, elements of one row); a scalar is one row."""
    return x.reshape(x.shape[0], prod(x.shape[1:])) if x.ndim else x.reshape(1, 1)


def pack(x_MN: Tensor) -> Tensor:
    """The signs of a matrix, four to a byte, the first in the lowest bits: (m, ceil(n / 4)), uint8."""
    codes = (x_MN > 0).to(torch.uint8) | (x_MN < 0).to(torch.uint8) << 1
    codes = pad(codes, (0, -codes.shape[1] % SIGNS_PER_BYTE))
    quads = codes.reshape(len(codes), codes.shape[1] // SIGNS_PER_BYTE, SIGNS_PER_BYTE)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack(signs: Tensor, columns: int) -> Tensor:
    """What was packed: POSITIVE, NEGATIVE or 0, as (m, columns), uint8."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=signs.device)
    return (signs.unsqueeze(2) >> shifts & 3).reshape(len(signs), SIGNS_PER_BYTE * signs.shape[1])[:, :columns]
