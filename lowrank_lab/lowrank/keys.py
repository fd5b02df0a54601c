"""The keys of the artifacts of low rank: spectra, ranks, factors. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.cells import config, versions
from lowrank_lab.cells.cell import Cell
from lowrank_lab.lowrank.answers import Answers, answers_of
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.remap import Remap


@dataclass(frozen=True)
class LowRankKeys:
    """Each hashes what changes the numbers of an artifact and nothing else, as those of cells/keys.py do."""

    cell: Cell

    @property
    def answers(self) -> Answers:
        return answers_of(self.cell)

    @property
    def statistics(self) -> str | None:
        """Identifies the input statistics; None where the metric needs none."""
        return self.cell.keys.statistics if self.answers.metric.needs_inputs else None

    @property
    def gradients(self) -> str | None:
        """Identifies the output gradients' statistics; None where the metric needs none."""
        return (
            self.cell.keys.gradients(self.answers.metric.needs_outer)
            if self.answers.metric.needs_gradients
            else None
        )

    @property
    def spectra(self) -> str:
        cfg = self.cell.cfg
        return fingerprint(
            {
                **self.cell.keys.dense_weights,
                "sites": [config.for_key(cfg.grouping), self.cell.keys.targets_for_key],
                "metric": config.for_key(cfg.metric),
                "statistics": self.statistics,
                "gradients": self.gradients,
                "version": versions.SPECTRA,
            }
        )

    @property
    def counted(self) -> list[Any]:
        """What the ratio counts. The storages of lowrank_lab that cost the same share their ranks.

        The cost of another class may be any function, so only its settings identify it.
        """
        storage, ratio_of = self.answers.storage, self.cell.cfg.targets.ratio_of
        if type(storage).cost in (Absorb.cost, Remap.cost):
            return [ratio_of, storage.cost(2, 3, 1)]  # 5 for rank · (out + in), 3 for rank · max(out, in)
        return [ratio_of, config.for_key(self.cell.cfg.storage)]

    @property
    def ranks(self) -> dict[str, Any]:
        """What the ranks depend on, apart from the ratio."""
        return {
            "spectra": self.spectra,
            "allocation": config.for_key(self.cell.cfg.allocation),
            "tokens": self.cell.keys.calibration_tokens if self.answers.allocation.needs_calibration else None,
            "counted": self.counted,
        }

    @property
    def factors(self) -> str:
        """Identifies the factors after refinement, before they are stored."""
        cell = self.cell
        return fingerprint(
            {
                "ranks": self.ranks,
                "ratio": cell.ratio,
                "refinement": config.for_key(cell.cfg.refinement, without=("dataset",)),
                "text": cell.keys.text_windows("refinement") if "refinement" in cell.training_data else None,
                "tokens": cell.keys.calibration_tokens if self.answers.refinement.needs_calibration else None,
                "version": versions.COMPRESSION,
            }
        )

    def compressed(self, before: str) -> str:
        """Identifies the weights after low rank, applied to those that ``before`` identifies."""
        content = {
            "ranks": self.ranks,
            "ratio": self.cell.ratio,
            "refinement": self.factors if self.answers.refinement is not None else None,
            "storage": config.for_key(self.cell.cfg.storage),
            "version": versions.COMPRESSION,
        }
        if before != self.cell.keys.dense:  # something was done to the dense model first
            content["before"] = before
        return fingerprint(content)
