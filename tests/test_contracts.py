"""The rules of size and typing: small modules, few positional parameters, no untyped dictionaries between rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "faceflow"

MOST_LINES, MOST_PARAMETERS = 350, 6
UNTYPED = ("dict[str, Any]", "Mapping[str, Any]", "MutableMapping[str, Any]")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function with its name, methods with their class's."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child
                yield from below(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from below(child, f"{prefix}{child.name}.")
            else:
                yield from below(child, prefix)

    yield from below(ast.parse(path.read_text()), "")


@pytest.mark.parametrize("path", [*modules(), *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: ask which second thing it has begun to do"


def test_functions_take_few_positional_parameters() -> None:
    many = []
    for path in modules():
        if PACKAGE / "kernels" in path.parents:
            continue
        for name, function in functions(path):
            count = len(function.args.posonlyargs) + len(function.args.args)
            if count > MOST_PARAMETERS:
                many.append(f"{path.relative_to(ROOT)}: {name} takes {count}")
    assert not many, "\n".join(many)


def test_no_untyped_dictionary_stands_in_a_signature_between_rooms() -> None:
    """A name that begins with an underscore stays in its module."""
    found = []
    for path in modules():
        for name, function in functions(path):
            if any(part.startswith("_") and not part.startswith("__") for part in name.split(".")):
                continue
            arguments = function.args
            annotations = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            for annotation in filter(None, [*annotations, function.returns]):
                text = ast.unparse(annotation)
                if any(kind in text for kind in UNTYPED):
                    found.append(f"{path.relative_to(ROOT)}: {name}: {text}")
    assert not found, f"{len(found)} signatures:\n" + "\n".join(found)


def test_stages_and_tasks_have_typed_results() -> None:
    """Every stage returns a dataclass of its own, frozen, and no two the same."""
    import dataclasses

    from faceflow.stages.results import CLASSES
    from faceflow.storage.layout import STAGES

    assert tuple(CLASSES) == STAGES
    assert len(set(CLASSES.values())) == len(STAGES)
    for kind in CLASSES.values():
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
