"""What is best among cells that are compressed alike, and what stands on top of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from lowrank_lab.reporting.sections import PERPLEXITY
from lowrank_lab.reporting.tables import groups, in_words, is_dense, present


def alike(group: pd.DataFrame) -> pd.Series:
    """Of each row what it may be ranked within: its ratio, and the bits of what is kept without decimals."""
    bits = (group["bits"] / group["ratio_reached"]).map("{:.0f}".format)
    return group["ratio"].map("{:g}".format) + " " + group["counted"] + " " + bits


def best(numbers: pd.Series, within: pd.Series, ascending: bool) -> set[Any]:
    """The indices of the best ``numbers`` (nan: none) of each set that has different ones."""
    found: set[Any] = set()
    for _, of_one in numbers.dropna().groupby(within):
        if of_one.nunique() > 1:
            found |= set(of_one.index[of_one == (of_one.min() if ascending else of_one.max())])
    return found


def spelled(told: dict[str, str]) -> str:
    """The variant of a row, short: a quantization by its name alone, and none that is not there."""
    return in_words(present(told)).replace("quantization=", "")


def plain_dense(group: pd.DataFrame) -> float | None:
    """The perplexity of the dense model as it is; None where it was not measured."""
    values = group.loc[is_dense(group), "value"].dropna()
    return None if values.empty else float(values.iloc[0])


def headlines(records: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Of each model a sentence on the perplexities that are most, with their caption; the largest table first."""
    sets = []
    for caption, group in groups(records, PERPLEXITY):
        compressed = group[~is_dense(group) & group["value"].notna() & group["whole"]]
        if len(compressed):
            sets.append((len(compressed), caption, group, compressed))
    said = set()
    for _, caption, group, compressed in sorted(sets, key=lambda found: (-found[0], found[1])):
        if (model := group["model"].iloc[0]) not in said:
            said.add(model)
            yield caption, _sentence(compressed, plain_dense(group))


def _sentence(compressed: pd.DataFrame, dense: float | None) -> str:
    """The best of those that most others can be compared with; of as many, those that are compressed least."""
    within = alike(compressed)
    sizes = within.map(within.value_counts())
    largest = compressed[sizes == sizes.max()]
    chosen = compressed[within == within[largest["bits"].idxmax()]]
    first = chosen.loc[chosen["value"].idxmin()]
    variant = spelled(first["told"])
    name = f"{first['method']} ({variant})" if variant else first["method"]
    times = f", {first['value'] / dense:.3g} × the dense model's {dense:.4g}" if dense else ""
    rank = f"has the lowest perplexity of {len(chosen)} cells" if len(chosen) > 1 else "has perplexity"
    where = f"At ratio {first['ratio']:g} and {first['bits']:.1f} bits a weight"
    return f"{where}, {name} {rank}: {first['value']:.4g}{times}."
