"""What a compressed checkpoint says of itself, under ``quantization_config`` in its config.json. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import mul
from typing import Any

from lowrank_lab.errors import UserError
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.site import Ranks, Site
from lowrank_lab.quantization.kv_cache import KvCache

QUANT_METHOD = "lowrank_lab"  # the name under which transformers knows these checkpoints
VERSION = 4  # raise when a checkpoint of the present kind could no longer be read
# 1 has no quantized linears, 2 no steps in front of them and no KV cache, 3 the cost of one rank of each site.
READABLE = (1, 2, 3, 4)
KINDS = ("factors", "remap")


@dataclass(frozen=True)
class Saved:
    """How a model was compressed: enough to rebuild its modules, and to count its sizes.

    method, ratio   the method's name and the ratio that was asked of it
    kind            ``factors``: two linears in the model's dtype; ``remap``: two MixedLinear
    sites, ranks    by full name, as everywhere; a rank of None is a site that stayed dense
    quantized       the formats of the linears in few bits, factors or dense: by "<block>.<name within the block>"
    steps           what is done to the input of linears, described, by the names, as above, of those that share it,
                    with commas between them
    final           what is done to the output of the last norm, described
    kv_cache        the format of keys and values; None: they are as they are
    """

    method: str
    ratio: float
    kind: str
    sites: dict[str, Site]
    ranks: Ranks
    quantized: dict[str, Format] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    final: list[dict[str, Any]] = field(default_factory=list)
    kv_cache: KvCache | None = None

    @property
    def is_quantized(self) -> bool:
        return bool(self.quantized or self.steps or self.final) or self.kv_cache is not None

    @property
    def online(self) -> bool:
        """Whether anything is done in the forward beside multiplying, which dense weights cannot hold."""
        return bool(self.steps or self.final) or self.kv_cache is not None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        sites = [
            {
                "name": name,
                "block": site.block,
                "members": list(site.members),
                "outs": list(site.outs),
                "inp": site.inp,
                "dense": site.dense,
                "cost": site.cost(self.ranks[name]),
                "rank": self.ranks[name],
            }
            for name, site in self.sites.items()
        ]
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "method": self.method,
            "ratio": self.ratio,
            "storage": self.kind,
            "sites": sites,
            "quantized": {name: asdict(form) for name, form in self.quantized.items()},
            "steps": self.steps,
            "final": self.final,
            "kv_cache": None if self.kv_cache is None else asdict(self.kv_cache),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Saved:
        """What ``to_dict`` gave. Raises UserError for another version and for what is not whole."""
        if data.get("version") not in READABLE or data.get("storage") not in KINDS:
            raise UserError(
                f"a lowrank_lab checkpoint of version {data.get('version')} and storage {data.get('storage')}; "
                f"this lowrank_lab reads version {VERSION} ({', '.join(KINDS)}): use the one that wrote it"
            )
        try:
            sites, ranks = {}, {}
            for entry in data["sites"]:
                outs = tuple(int(out) for out in entry["outs"])
                cost = (int(entry["dense"]), _cost_of(entry))
                site = Site(int(entry["block"]), tuple(entry["members"]), outs, int(entry["inp"]), *cost)
                sites[str(entry["name"])] = site
                ranks[str(entry["name"])] = None if entry["rank"] is None else int(entry["rank"])
            quantized = {str(name): Format(**form) for name, form in data.get("quantized", {}).items()}
            steps = {str(names): [dict(step) for step in found] for names, found in data.get("steps", {}).items()}
            final = [dict(step) for step in data.get("final", [])]
            kv_cache = None if data.get("kv_cache") is None else KvCache(**data["kv_cache"])
            made = str(data["method"]), float(data["ratio"]), data["storage"], sites, ranks
            return cls(*made, quantized, steps, final, kv_cache)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"a lowrank_lab checkpoint whose quantization_config is damaged ({type(error).__name__}: {error})"
            ) from None


def _cost_of(site: Mapping[str, Any]) -> Callable[[int], int]:
    """The cost of a site at its own rank; all that is known of it, except in files of versions 1 to 3."""
    if "per_rank" in site:
        return partial(mul, int(site["per_rank"]))
    return {site["rank"]: int(site["cost"])}.__getitem__


def saved_in(config: Mapping[str, Any]) -> Saved | None:
    """How the model of a config.json was compressed by lowrank_lab; None where it was not. May raise UserError."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != QUANT_METHOD:
        return None
    return Saved.from_dict(quantization)
