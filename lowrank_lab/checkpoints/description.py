"""The description of a compressed checkpoint, under ``quantization_config`` in its config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints import old_versions
from lowrank_lab.models.own_config import MODEL_TYPE
from lowrank_lab.modules.site import HeadSite, Site

QUANT_METHOD = MODEL_TYPE  # the name under which transformers knows these checkpoints
OF_HEADS = ("product", "head", "heads", "width")  # what the product of two linears within a head has more
VERSION = 4  # raise when a checkpoint of the present kind could no longer be read


@dataclass(frozen=True)
class Saved:
    """How a model was compressed: enough to rebuild its modules, and to count its sizes.

    method, ratio   the method's name and the requested ratio
    sites, ranks    by full name; a rank of None is a site that stayed dense
    modules         by full path each module that replaces one of the model's original modules, also within others:
                    its ``kind``, its description, and in ``borrows`` the paths of modules that others list for it
    is_quantized    whether it has weights of few bits or steps before linears: it is not quantized again
    online          whether its forward does more than multiply by weights, which dense weights cannot hold
    kv_cache        the format of keys and values; None: they are not rounded
    """

    method: str
    ratio: float
    sites: dict[str, Site]
    ranks: dict[str, int | None]
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_quantized: bool = False
    online: bool = False
    kv_cache: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "method": self.method,
            "ratio": self.ratio,
            "sites": [_site_to_dict(name, site, self.ranks[name]) for name, site in self.sites.items()],
            "modules": self.modules,
            "quantized": self.is_quantized,
            "online": self.online,
            "kv_cache": self.kv_cache,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Saved:
        """The inverse of ``to_dict``. Raises UserError for an unknown version and for damaged data."""
        if data.get("version") != VERSION:
            raise UserError(
                f"a lowrank_lab checkpoint of version {data.get('version')} cannot be read: "
                f"this lowrank_lab reads version {VERSION} and older ones; use the one that wrote it"
            )
        try:
            named = [_site_from_dict(entry) for entry in data["sites"]]
            modules = {str(path): dict(description) for path, description in data["modules"].items()}
            for description in modules.values():
                str(description["kind"])
            return cls(
                str(data["method"]),
                float(data["ratio"]),
                {name: site for name, site, _ in named},
                {name: rank for name, _, rank in named},
                modules,
                bool(data["quantized"]),
                bool(data["online"]),
                None if data["kv_cache"] is None else dict(data["kv_cache"]),
            )
        except DAMAGED as error:
            raise damaged(error) from None


DAMAGED = (AttributeError, KeyError, TypeError, ValueError)  # what damaged data raise


def damaged(error: Exception) -> UserError:
    return UserError(
        f"a lowrank_lab checkpoint whose quantization_config is damaged ({type(error).__name__}: {error})"
    )


def in_present_version(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description ``data``, of the present version or an older one. Raises UserError for damaged data."""
    if data.get("version") not in old_versions.READABLE:
        return data
    try:
        return {**old_versions.converted(data), "version": VERSION}
    except DAMAGED as error:
        raise damaged(error) from None


def saved_in(config: Mapping[str, Any]) -> Saved | None:
    """How the model of a ModelSource's settings was compressed by lowrank_lab; None where it was not.

    May raise UserError.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != QUANT_METHOD:
        return None
    return Saved.from_dict(in_present_version(quantization))


def _site_to_dict(name: str, site: Site, rank: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "block": site.block,
        "members": list(site.members),
        "outs": list(site.outs),
        "inp": site.inp,
        "dense": site.dense,
        "cost": site.cost(rank),
        "rank": rank,
        **({name: getattr(site, name) for name in OF_HEADS} if isinstance(site, HeadSite) else {}),
    }


def _site_from_dict(entry: Mapping[str, Any]) -> tuple[str, Site, int | None]:
    """The name, the site and its rank. A checkpoint does not say what other ranks would cost."""
    rank = None if entry["rank"] is None else int(entry["rank"])
    outs = tuple(int(out) for out in entry["outs"])
    place = (int(entry["block"]), tuple(entry["members"]), outs, int(entry["inp"]), int(entry["dense"]))
    costs = {rank: int(entry["cost"])}.__getitem__
    if "product" in entry:
        return str(entry["name"]), HeadSite(*place, costs, *(entry[name] for name in OF_HEADS)), rank
    return str(entry["name"]), Site(*place, costs), rank
