"""One expert folded into heads, and their weights read out: the way in which every version is computed, whether of a
drop or of what is in the archive.

Which experts, onto which states, and whether what was read is sound is the caller's part.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from daemon.checkpoints.checkpoint import OpenCheckpoint
from daemon.config import Publish
from daemon.home.ground import Base
from daemon.versions.writing import Outputs, Written, weights_plan
from projector.driver.fold import Driver
from projector.driver.head import Folded, HeadFold, Norms, Prepared
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.method import Contribution, Method, Totals
from projector.methods import make


class Folding:
    """Over one base, whose versions look as `settings` say."""

    def __init__(self, base: Base, settings: Publish, driver: Driver) -> None:
        self._base = base.tensors
        self._plan = weights_plan(base.checkpoint, settings)
        self._dtype = settings.dtype
        self._driver = driver
        self._base_norms: Norms | None = None

    def work_bytes(self, methods: Iterable[Method], *, weights: bool = True) -> int:
        """What the driver will have reported at the end: the tensors that are merged once for each sweep over them."""
        sweeps = 1 + sum(method.rounds + (weights and not method.one_sweep) for method in methods)
        return sweeps * sum(spec.nbytes for spec in self._base.schema.values() if spec.merged)

    def outputs(self, folder: Path, method: Method, files: ExitStack, *, weights: bool = True) -> Outputs:
        """The files of one head's next version, in this folder. Without `weights` for a state that is only gone on
        from.
        """
        plan = self._plan if weights else ((), None)
        return Outputs(folder, self._base.schema, method, plan, files, self._driver.watch)

    def head(
        self,
        expert: OpenCheckpoint,
        method: Method,
        totals: Totals,
        contribution: Contribution,
        before: TensorReader | None,
        output: Outputs,
        prepared: Prepared | None = None,
        origin: Checkpoint | None = None,
    ) -> HeadFold:
        """How a head takes this expert: surveyed first, where its method has rounds for that.

        contribution: its place and its weight. before: the head's state, None where it has none yet. origin: what the
        expert was trained from, where the head takes what was trained since.
        """
        if method.keyed:
            contribution = replace(contribution, sha256=expert.identity())
        contribution = self._driver.survey(self._base, expert.tensors, method, contribution, before, origin)
        now = output.weights if method.one_sweep else ()
        return HeadFold(method, totals, contribution, before, output.state, prepared, now, output.record, origin)

    def fold(self, expert: OpenCheckpoint, heads: Sequence[HeadFold]) -> Folded:
        """Reads the expert once, into every head's new state; see `Driver.fold`."""
        folded = self._driver.fold(self._base, expert.tensors, heads, self._base_norms)
        self._base_norms = folded.base
        return folded

    def read_out(self, method: Method, totals: Totals, output: Outputs) -> Written:
        """Writes a head's weights, where the fold did not, and closes the account of its files. totals: after it."""
        if not method.one_sweep:
            self._driver.read_out(self._base, method, totals, output.state.reader(), output.weights)
        return output.finish(totals, self._dtype, approximate=method.approximate)

    def alone(self, expert: OpenCheckpoint, folder: Path) -> Written:
        """The expert by itself, as a version would be: what the method `latest` makes of it."""
        method = make("latest", {})
        with ExitStack() as files:
            output = self.outputs(folder, method, files)
            folded = self.fold(expert, [self.head(expert, method, Totals(), Contribution(1), None, output)])
            return self.read_out(method, folded.totals[0], output)
