"""What a compression answers: low rank, pruning, quantization, a smaller cache. No torch."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

Plan = dict[str, Any]  # plain data, by the full name of a site or linear: its rank, sparsity, format, …


class Compression:
    """One thing that is done to a model. The compressions of a cell are applied one after the other.

    A new one is a class, a YAML in its axis' folder, and a module (modules/base.py) if it puts one into the model.
    ``cell`` is a cells.cell.Cell, ``context`` a running.context.Context: it has the model, the linears that the
    cell targets, texts and statistics.

    axis            the node of the configuration that describes it
    kind            what a model is called that only this has changed (``Evaluator.models`` lists such kinds)
    kind_in_words   the same for a message
    components      the names of its versions in versions.py, if it has some there
    makes_factors   whether it puts two factors in the place of a linear
    on_checkpoints  whether it may be applied to a checkpoint of lowrank_lab, which is compressed already
    site_rules      the grouping, targets and storage that it works with, where it has its own
    """

    axis: str
    kind = "compressed"
    kind_in_words = "a compressed model"
    components: tuple[str, ...] = ()
    makes_factors = False
    on_checkpoints = True
    site_rules: tuple[Any, Any, Any] | None = None

    @property
    def name(self) -> str:
        """What tables, labels and checkpoints call it; "" where the name of the method says it."""
        return ""

    @property
    def family(self) -> str:
        """The name without what varies along one line of a figure, such as the bits."""
        return self.name

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads the calibration text."""
        return False

    @property
    def online(self) -> bool:
        """Whether it leaves work for the forward which dense weights cannot hold."""
        return False

    @property
    def mixes_channels(self) -> bool:
        """Whether it multiplies weights by matrices, such as rotations, so that their zeros are lost."""
        return False

    @property
    def changes_inputs(self) -> bool:
        """Whether linears are given something else than those of the dense model."""
        return False

    def settings(self, cfg: dict[str, Any]) -> dict[str, Any]:
        """Those of ``cfg``, plain data, that may tell two cells apart (cells/settings.py); a name may say all."""
        return {self.axis: self.name}

    def check_settings(self, cfg: DictConfig) -> None:
        """Raise UserError for settings of the cell's configuration that do not go together."""

    def check_cell(self, cell: Any) -> None:
        """Raise UserError for what a user can mend: a missing library, a checkpoint that does not suit it."""

    def switch_off(self, cfg: DictConfig) -> None:
        """Make ``cfg`` say that it is not applied: to a checkpoint that is compressed already."""
        cfg.compressions[self.axis] = cfg[self.axis] = None

    def ratio(self, cfg: DictConfig) -> float | None:
        """The fraction kept that was asked for; None where the compression has no such ratio."""
        return None

    def texts(self, cfg: DictConfig) -> dict[str, DictConfig]:
        """The nodes of ``cfg``, by name, that describe windows of a text of its own (not the calibration text)."""
        return {}

    def key(self, cell: Any, before: str) -> str:
        """Identifies the weights after it, where ``before`` identifies those that it is given."""
        raise NotImplementedError

    def check(self, context: Any) -> None:
        """Raise SkippedCell, before the model is read, where the architecture does not allow it."""

    def plan(self, context: Any) -> Plan:
        """What will be done to each site or linear. Raises SkippedCell where the settings make no sense."""
        raise NotImplementedError

    def ranks(self, plan: Plan) -> dict[str, int | None] | None:
        """The rank that ``plan`` gives each site (None: it stays dense); None where it is not about ranks."""
        return None

    def apply(self, context: Any, plan: Plan) -> dict[str, Any]:
        """Change ``context.model`` in place; returns facts about it, plain data for the record."""
        raise NotImplementedError
