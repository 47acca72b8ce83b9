"""Nothing that serves reads pickles or runs what a file says: the code has no call that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ovms_lora"
SERVING = sorted(path for path in PACKAGE.rglob("*.py") if PACKAGE / "export" not in path.parents)
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm", "yaml", "runpy"}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen")}
KEYWORDS = {"allow_pickle", "shell", "trust_remote_code"}


def found(tree: ast.AST) -> Iterator[str]:
    """Yield what a module has that could run what it reads."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in LOADERS:
                yield f"{owner}.{name}"
            case ast.keyword(arg=str(name)) if name in KEYWORDS:
                yield name


@pytest.mark.parametrize("path", SERVING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_that_serves_runs_nothing_it_reads(path: Path) -> None:
    assert list(found(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import torch, marshal",
        "from shelve import open",
        "eval(x)",
        "exec(x)",
        "compile(x, '', 'exec')",
        "__import__(x)",
        "torch.load(f)",
        "np.load(f)",
        "load = numpy.load",
        "f(allow_pickle=False)",
        "run(x, shell=True)",
    ],
)
def test_such_code_would_be_found(code: str) -> None:
    assert list(found(ast.parse(code)))


def test_patterns_and_graphs_may_be_compiled() -> None:
    assert not list(found(ast.parse("re.compile(x); source.compile(targets)")))
