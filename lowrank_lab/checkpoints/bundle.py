"""The code beside a checkpoint: one Python file with those definitions of this package that load it.

It is written from the sources, from what transformers asks for and from the classes of the modules in the model on
to all that these use. So nothing is written twice, and a checkpoint holds no code that it does not need. What it
takes is a definition at the top of a module; from other packages than this one, and than that of a module from
outside, it imports.
"""

from __future__ import annotations

import ast
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import lowrank_lab
from lowrank_lab.models.vision_families import AUTO, task_of
from lowrank_lab.modules.base import Described

log = logging.getLogger(__name__)

HEAD = '''"""How transformers loads the compressed model in this folder.

    {auto}.from_pretrained(folder, trust_remote_code=True)

lowrank_lab {version} has taken this file out of its own modules, named below: all that this model uses of them.
Where lowrank_lab is imported it loads the model itself, and this file is not used.
"""

from __future__ import annotations
'''
FOOT = """
# A process may load models with other files like this one: each has its own name.
register(__name__)
CompressedConfig.is_trusted = True
if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:  # lowrank_lab is imported, and was asked to trust this file
    CompressedConfig.quant_method = QUANT_METHOD
"""

Name: TypeAlias = tuple[str, str]  # of a definition: its module, and its name there
LOADER: Name = ("lowrank_lab.checkpoints.loading", "register")


def code_of(model: Any) -> str | None:
    """The Python file that loads ``model``; None, with a warning, where the class of a module cannot be taken."""
    kinds = {type(module) for module in model.modules() if isinstance(module, Described)}
    names = sorted((kind.__module__, kind.__qualname__) for kind in kinds)
    try:
        return bundle([LOADER, *names], AUTO[task_of(_model_type(model))])
    except (OSError, TypeError, LookupError) as error:
        log.warning(
            "the checkpoint can be loaded only where lowrank_lab is installed: no code is saved (%s)", error
        )
        return None


def _model_type(model: Any) -> str | None:
    """That of a transformers model; None for another module."""
    return getattr(getattr(model, "config", None), "model_type", None)


def bundle(roots: list[Name], auto: str) -> str:
    """The file with these definitions and all that they use, for models that the class ``auto`` loads.

    Raises LookupError for one that is not at the top of its module, or that has the name of another one.
    """
    found: dict[Name, None] = {}
    for root in roots:
        _collect(root, found)
    imports, parts = _imports(found), []
    for module in _in_order(found):
        source = _source(module)
        texts = [source.text(name) for name in source.definitions if (module, name) in found]
        parts.append(_joined([f"# {module}", *dict.fromkeys(texts)]))
    return "\n\n\n".join(
        [HEAD.format(version=lowrank_lab.__version__, auto=auto) + "\n" + imports, *parts, FOOT.lstrip()]
    )


class _Source:
    """The source of a module: what is defined and imported at its top, by name."""

    def __init__(self, module: str) -> None:
        text = inspect.getsource(sys.modules[module])
        self.module, self.lines = module, text.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}  # the module, and the name in it; None is all of it
        for statement in ast.parse(text).body:
            self._add(statement)

    def _add(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import):
            for one in statement.names:
                self.imports[one.asname or one.name] = (one.name, None)
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for one in statement.names:
                self.imports[one.asname or one.name] = (statement.module, one.name)
        elif isinstance(statement, ast.If) and isinstance(statement.test, ast.Name):  # TYPE_CHECKING
            for one_of_two in statement.body:  # the other branch postpones the same import
                self._add(one_of_two)
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            self.definitions[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for name in (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)):
                self.definitions[name] = statement

    def text(self, name: str) -> str:
        """A definition with its decorators and the comment above it."""
        statement = self.definitions[name]
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(one.lineno for one in decorators)]) - 1
        while first > 0 and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : statement.end_lineno])

    def uses(self, name: str) -> Iterator[Name]:
        """The definitions of this package, and of this module, that a definition uses."""
        for used in _names_in(self.definitions[name]):
            if used in self.definitions:
                yield self.module, used
            elif used in self.imports and _is_ours(self.imports[used][0]):
                module, original = self.imports[used]
                if original != used:
                    raise LookupError(f"{self.module} imports {original or module} as {used}")
                yield module, original


_source = cache(_Source)


def _collect(name: Name, found: dict[Name, None]) -> None:
    """Add a definition and all that it uses."""
    if name in found:
        return
    module, own_name = name
    if own_name not in _source(module).definitions:
        raise LookupError(f"{own_name} is not defined at the top of {module}")
    if other := next((one for one, its_name in found if its_name == own_name), None):
        raise LookupError(f"{module} and {other} both define {own_name}")
    found[name] = None
    for used in _source(module).uses(own_name):
        _collect(used, found)


def _in_order(found: Iterable[Name]) -> list[str]:
    """The modules, each after those that it uses."""
    ordered: dict[str, None] = {}

    def add(module: str) -> None:
        for name in sorted(found):
            if name[0] == module:
                for used, _ in _source(module).uses(name[1]):
                    if used != module and used not in ordered:
                        add(used)
        ordered[module] = None

    for module in sorted({module for module, _ in found}):
        if module not in ordered:
            add(module)
    return list(ordered)


def _imports(found: Iterable[Name]) -> str:
    """The import statements of what is not ours, the standard library first."""
    origins: dict[str, tuple[str, str | None]] = {}  # by the name here: the module, and the name in it
    for module, name in found:
        source = _source(module)
        for used in _names_in(source.definitions[name]):
            if used in source.definitions or used not in source.imports or _is_ours(source.imports[used][0]):
                continue
            if origins.setdefault(used, source.imports[used]) != source.imports[used]:
                raise LookupError(f"{module} and another module both import something as {used}")
    names: dict[str, list[str]] = {}
    for name, (origin, original) in sorted(origins.items()):
        if original is None:
            names[f"import {origin}" + (f" as {name}" if name != origin else "")] = []
        else:
            names.setdefault(f"from {origin} import ", []).append(
                name if name == original else f"{original} as {name}"
            )
    lines = sorted(statement + ", ".join(imported) for statement, imported in names.items())
    is_standard = lambda line: line.split()[1].partition(".")[0] in sys.stdlib_module_names
    standard, others = (
        "\n".join(line for line in lines if is_standard(line) is wanted) for wanted in (True, False)
    )
    return f"{standard}\n\n{others}"


def _joined(texts: list[str]) -> str:
    """Definitions one below the other; constants of a line are not spread out."""
    joined = texts[0]
    for before, text in pairwise(texts):
        joined += ("\n" if "\n" not in before + text and not before.startswith("# ") else "\n\n\n") + text
    return joined


def _names_in(statement: ast.stmt) -> dict[str, None]:
    return dict.fromkeys(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == lowrank_lab.__name__
