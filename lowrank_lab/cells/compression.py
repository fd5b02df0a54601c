"""The interface of compressions: low rank, pruning, quantization, a smaller cache. No torch."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

Plan = dict[str, Any]  # plain data, by the full name of a site or linear: its rank, sparsity, format, …


class Compression:
    """One change of a model. The compressions of a cell are applied one after the other.

    A new one is a class, a YAML in its axis' folder, and a module (modules/base.py) if it puts one into the model.
    ``cell`` is a cells.cell.Cell, ``context`` a running.context.Context: it has the model, the linears that the
    cell targets, texts and statistics.

    axis            the node of the configuration that describes it
    kind            the kind of a model that only this has changed (``Evaluator.models`` lists such kinds)
    kind_in_words   the same for messages
    components      the names of its versions in versions.py, if it has some there
    makes_factors   whether it replaces a linear by two factors
    on_checkpoints  whether it may be applied to a checkpoint of lowrank_lab, which is already compressed
    in_name         its settings that its name says, so that labels need not tell them
    site_rules      its grouping, targets and storage, where it does not take those of the configuration
    """

    axis: str
    kind = "compressed"
    kind_in_words = "a compressed model"
    components: tuple[str, ...] = ()
    makes_factors = False
    on_checkpoints = True
    in_name: tuple[str, ...] = ()
    site_rules: tuple[Any, Any, Any] | None = None

    @property
    def name(self) -> str:
        """Its name in tables, labels and checkpoints; "" where the name of the method is enough."""
        return ""

    @property
    def family(self) -> str:
        """The name without the part that varies along one line of a figure, such as the bits."""
        return self.name

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads the calibration text."""
        return False

    @property
    def online(self) -> bool:
        """Whether it adds work to the forward that dense weights cannot hold."""
        return False

    @property
    def mixes_channels(self) -> bool:
        """Whether it multiplies weights by matrices, such as rotations, so that pruned weights become nonzero."""
        return False

    @property
    def changes_inputs(self) -> bool:
        """Whether it changes the inputs of linears."""
        return False

    def settings(self, cfg: dict[str, Any]) -> dict[str, Any]:
        """Those of ``cfg``, plain data, in which two cells may differ (cells/settings.py)."""
        return {self.axis: self.name}

    def check_settings(self, cfg: DictConfig) -> None:
        """Raise UserError for settings of the cell's configuration that cannot be combined."""

    def check_cell(self, cell: Any) -> None:
        """Raise UserError for what a user can correct: a missing library, a checkpoint that it cannot change."""

    def switch_off(self, cfg: DictConfig) -> None:
        """Make ``cfg`` say that it is not applied: to a checkpoint that is compressed already."""
        cfg.compressions[self.axis] = cfg[self.axis] = None

    def ratio(self, cfg: DictConfig) -> float | None:
        """The requested fraction that is kept; None where the compression has no such ratio."""
        return None

    def texts(self, cfg: DictConfig) -> dict[str, DictConfig]:
        """The nodes of ``cfg``, by name, of other texts than the calibration text that it reads windows of."""
        return {}

    def key(self, cell: Any, before: str) -> str:
        """Identifies the weights after it, where ``before`` identifies those before it."""
        raise NotImplementedError

    def check(self, context: Any) -> None:
        """Raise SkippedCell, before the model is read, where the architecture does not allow it."""

    def plan(self, context: Any) -> Plan:
        """The change of each site or linear. Raises SkippedCell where the settings cannot be combined."""
        raise NotImplementedError

    def ranks(self, plan: Plan) -> dict[str, int | None] | None:
        """The rank of each site in ``plan`` (None: it stays dense); None for a compression without ranks."""
        return None

    def apply(self, context: Any, plan: Plan) -> dict[str, Any]:
        """Change ``context.model`` in place; returns facts about it, plain data for the record."""
        raise NotImplementedError
