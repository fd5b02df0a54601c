"""Where a record's ranks went: by linear and block, in weights and bytes, with the spectra that they cut."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowrank_lab.artifacts.store import Artifact, Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN
from lowrank_lab.modules.site import Site
from lowrank_lab.records.results import Results, compression_of
from lowrank_lab.reporting.kinds.errors import linear_names


def ranks(record: dict[str, Any]) -> pd.DataFrame:
    """``block``, ``linear`` and ``rank`` (nan where it stays dense) of every site, from the record alone.

    Linears that are factored together are one row, "q+k+v". Raises UserError for a record that compresses nothing.
    """
    found = compression_of(record, "lowrank").get("plan")
    if found is None:
        raise UserError(f"{record['label']} has no ranks; choose a record of a compressed model that is done")
    places = [_place(name) for name in found]
    paths = [member for _, key in places for member in key.split("+")]
    short = linear_names(dict.fromkeys(paths))
    return pd.DataFrame(
        {
            "site": list(found),
            "block": [block for block, _ in places],
            "linear": ["+".join(short[member] for member in key.split("+")) for _, key in places],
            "rank": pd.Series(list(found.values()), dtype=float),
        }
    )


def weights_and_bytes(record: dict[str, Any], sites: dict[str, Site]) -> pd.DataFrame:
    """``ranks`` with ``full`` (the rank that reproduces the matrix), ``weights``, ``dense`` and ``bytes``.

    ``weights`` are those kept, ``dense`` those before, biases apart. Bytes are at the mean of the record's sites,
    scales and the like with them: exact where all weights have as many bits, so not where factors are remapped.
    """
    table = ranks(record)
    of_site = [sites[name] for name in table["site"]]
    plan = compression_of(record, "lowrank")["plan"]
    kept = [plan[name] for name in table["site"]]
    total = record["sizes"]["sites"]
    table["full"] = [site.full for site in of_site]
    table["weights"] = [site.parameters(rank) for site, rank in zip(of_site, kept, strict=True)]
    table["dense"] = [site.parameters(None) for site in of_site]
    table["bytes"] = table["weights"] * (total["bytes"] / total["parameters"])
    return table


def sites(record: dict[str, Any], results: Results) -> dict[str, Site]:
    """The sites of a record's model with their shapes, from its config.json; no weights are read.

    Raises UserError where the config.json is not on this machine: neither among the artifacts nor in model.path nor
    in the hub's cache.
    """
    from lowrank_lab.models.discovery import family_of
    from lowrank_lab.models.load import load_config, skeleton
    from lowrank_lab.modules.linears import linear_shapes

    model = record["config"]["model"]
    converted = artifact(record, "model conversion", results)
    location = model["path"] if converted is None else str(converted.path)
    try:  # a report runs no code of a model's authors, whatever a record says
        config = load_config(location, record["content"]["revision"], False, local_files_only=True)
    except (OSError, ValueError, UserError):
        raise UserError(
            f"the shapes of {record['model']} are not on this machine; to have them, {again(record, results)}"
        ) from None
    model = skeleton(config, False)
    shapes = linear_shapes(model, family_of(model).tower)
    described = compression_of(record, "lowrank")["sites"]
    return {name: _site(of_one, shapes) for name, of_one in described.items()}


def _site(described: dict[str, Any], shapes: list[dict[str, tuple[int, int]]]) -> Site:
    """A site as a record describes it, costs in weights; ``shapes`` has by block the (out, in) of linears."""
    members = tuple(described["linears"])
    of_members = [shapes[described["block"]][member] for member in members]
    outs, inp = tuple(out for out, _ in of_members), of_members[0][1]
    out = sum(outs)
    return Site(described["block"], members, outs, inp, out * inp, lambda rank: rank * (out + inp))


def artifact(record: dict[str, Any], stage: str, results: Results) -> Artifact | None:
    """The artifact of a record's stage: below the results, or where the record says; None where it is gone."""
    named = [entry["artifact"] for entry in record["stages"] if entry["stage"] == stage and "artifact" in entry]
    roots = [results.root / "artifacts", *map(Path, filter(None, [record["config"].get("artifacts")]))]
    for root in roots if named else ():
        if found := Store(root).get(*named[0].split("/")):
            return found
    return None


def again(record: dict[str, Any], results: Results) -> str:
    """What makes a record's artifacts once more, in one line; its numbers stay the same."""
    return f"move {results.path(record['key'])} away and run: {RUN} {shlex.join(record['command'][1:])}"


def spectrum(folder: Path, site: Site) -> pd.DataFrame:
    """By ``rank`` 0 … full: the ``singular_value`` cut there, the ``tail_error`` left, both relative.

    ``singular_value`` is σ of R^½ W C^½ over the largest (at rank k the k-th; nan at rank 0), ``tail_error`` the
    error ‖R^½ (W − W') C^½‖_F over that of W' = 0. ``folder`` is the artifact of the stage "decomposition".
    """
    from lowrank_lab.lowrank.spectra import load_singular_values, load_tails

    [squared] = load_tails(folder, {"site": site}).values()
    values = load_singular_values(folder, site).double().numpy()
    return pd.DataFrame(
        {
            "rank": np.arange(len(squared)),
            "singular_value": np.append(np.nan, values / values[0]),
            "tail_error": np.sqrt(squared / squared[0]),
        }
    )


def _place(name: str) -> tuple[int, str]:
    """The block and the key of a site, from its full name "model.layers.3.self_attn.q_proj"."""
    parts = name.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[number]), ".".join(parts[number + 1 :])
