"""Pages of the options, generated from the comments at the top of their YAML files."""

from __future__ import annotations

import re
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"

# Where a reader finds the work that an option implements.
PAPERS = {
    "asvd": ("ASVD", "https://arxiv.org/abs/2312.05821"),
    "comcat": ("COMCAT", "https://arxiv.org/abs/2305.17235"),
    "dobi": ("Dobi-SVD", "https://arxiv.org/abs/2502.02723"),
    "fwsvd": ("FWSVD", "https://arxiv.org/abs/2207.00112"),
    "kron": ("no paper; IO-SVD weighs both sides too", "https://arxiv.org/abs/2605.15626"),
    "qsvd": ("QSVD", "https://arxiv.org/abs/2510.16292"),
    "svd": ("Eckart and Young 1936", "https://doi.org/10.1007/BF02288367"),
    "svdllm": ("SVD-LLM", "https://arxiv.org/abs/2403.07378"),
    "svdllm_v2": ("SVD-LLM V2", "https://arxiv.org/abs/2503.12340"),
    "wsvd": (
        "weighted low rank, Srebro and Jaakkola 2003",
        "https://people.csail.mit.edu/tommi/papers/SreJaa-icml03.pdf",
    ),
}
PAGES = {"method": "Methods", "quantization": "Quantizations", "experiment": "Experiments", "eval": "Evaluators"}


def header(file: Path) -> str:
    """The comment at the top of a YAML file, without Hydra's package line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def paper(method: str) -> tuple[str, str] | None:
    """The name and the address of a method's paper, found by the longest beginning of its name."""
    begins = [name for name in PAPERS if method == name or method.startswith(f"{name}_")]
    return PAPERS[max(begins, key=len)] if begins else None


def page(axis: str, title: str) -> str:
    """A page with a section for each option of an axis."""
    parts = [f"# {title}: every option", f"`{axis}=NAME` chooses one; the files are in `conf/{axis}/`."]
    for file in sorted((CONF / axis).glob("*.yaml")):
        if file.stem.startswith("_"):
            continue
        parts.append(f"## `{file.stem}`")
        text = re.sub(r"papers/(\d{3})", r"source \1", header(file))
        first, *rest = text.split("\n")
        parts.append(first)
        if rest:
            parts.append("\n".join(f"> {line.strip()}" for line in rest))
        if axis == "method" and (found := paper(file.stem)):
            parts.append(f"Paper: [{found[0]}]({found[1]})")
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path) -> None:
    """Write the pages of all axes into ``folder``."""
    folder.mkdir(exist_ok=True)
    for axis, title in PAGES.items():
        (folder / f"{axis}.md").write_text(page(axis, title), encoding="utf-8")
