"""How the package is built: parts are called, not looked at, and files and functions are of a readable size."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "t5x_like"

MAX_MODULE_LINES = 420
MAX_FUNCTION_LINES = 85

TYPE_TESTS = {
    "huggingface/families/deepseek.py: _write_rotary: YarnScaling",
    "huggingface/families/llama.py: DecoderFamily.attention: LongRopeScaling",
    "huggingface/families/phi3.py: Phi3.write_more: LongRopeScaling",
    "huggingface/families/rotary.py: write_rotary: DynamicScaling",
    "huggingface/families/t5.py: T5Family.write: RelativeBiasConfig",
    "models/transformer.py: ModelConfig.stacks: StackConfig",
}
"""Code that asks what class a part of the run is, outside the module of that class: "file: function: class"."""

PROBES = {
    # Objects of other libraries, which differ by version and by device.
    "kernels/attention/mosaic_products.py: interpretation: InterpretGPUParams",
    "planning/liveness.py: _local_size: shape",
    "planning/liveness.py: sharded_size.size: shape",
    "planning/worker.py: network_of: slice_index",
    "runtime/malloc.py: keep_freed_memory: mallopt",
    "sharding/mesh.py: build_mesh: slice_index",
    "sharding/mesh.py: describe_mesh: slice_index",
    # Our own.
    "planning/search.py: _holds_stack: remat",
    "planning/search.py: _with_stacks: remat",
}
"""Code that asks whether an object has an attribute: "file: function: attribute"."""

LONG_MODULES = {"data/tokenizers.py"}
"""Modules above the limit."""


@cache
def modules() -> dict[str, ast.Module]:
    """The modules of the package by path."""
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def called(node: ast.AST) -> str:
    """The last name of `a.b.name`, of `name`, and of what `name[...]` and `name(...)` begin with; else nothing."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return called(inner)
    return ""


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


@cache
def configurables() -> frozenset[str]:
    return frozenset(
        cls.name
        for tree in modules().values()
        for cls in classes(tree)
        if any(called(decorator) == "configurable" for decorator in cls.decorator_list)
    )


def functions(tree: ast.AST, name: str = "<module>") -> Iterator[tuple[str, ast.AST]]:
    """Every node of a module with the function or class that it is in: "Class.method"."""
    for node in ast.iter_child_nodes(tree):
        inside = name
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            inside = node.name if name == "<module>" else f"{name}.{node.name}"
        yield inside, node
        yield from functions(node, inside)


def named_classes(node: ast.AST) -> Iterator[str]:
    """The classes of the run's parts that the second argument of `isinstance`, or a comparison, names."""
    for part in ast.walk(node):
        if (name := called(part)) and (name.endswith("Config") or name in configurables()):
            yield name


def type_tests(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Where a module asks for the class of a part, and which: by isinstance, type(x) is, `case`, or a table."""
    is_type = lambda node: isinstance(node, ast.Call) and called(node) == "type"
    for inside, node in functions(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, asked]):
                names = named_classes(asked)
            case ast.Compare(left=left, comparators=others) if any(map(is_type, [left, *others])):
                names = (name for side in [left, *others] if not is_type(side) for name in named_classes(side))
            case ast.MatchClass(cls=asked):
                names = named_classes(asked)
            case ast.Dict(keys=keys):
                bare = (key for key in keys if isinstance(key, ast.Name | ast.Attribute))
                names = (name for key in bare for name in named_classes(key))
            case _:
                continue
        yield from ((inside, name) for name in names)


def probes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Where a module asks whether an object has an attribute, and which; a computed name as it is written."""
    for inside, node in functions(tree):
        match node:
            case (
                ast.Call(func=ast.Name(id="getattr"), args=[_, asked, _])
                | ast.Call(func=ast.Name(id="hasattr"), args=[_, asked])
            ):
                yield inside, asked.value if isinstance(asked, ast.Constant) else ast.unparse(asked)


def check(found: set[str], allowed: set[str], remedy: str) -> None:
    assert not found - allowed, f"{sorted(found - allowed)}: {remedy}"
    assert not allowed - found, f"{sorted(allowed - found)}: this is gone, so take it off the list."


def test_the_search_finds_what_it_should():
    code = """
def f(x):
    isinstance(x, MLPConfig | int)
    type(x) == mlp.MLPConfig
    match x:
        case AlibiConfig():
            return {MoEConfig: 1}[type(x)]
    isinstance(x, int), type(x) is int, {1: MLPConfig}, x.mlp_config
class C:
    def m(self, x):
        return hasattr(x, "a") or getattr(x, "b", None) or getattr(x, "c")
"""
    found = ["MLPConfig", "MLPConfig", "AlibiConfig", "MoEConfig"]
    assert sorted(type_tests(ast.parse(code))) == sorted(("f", name) for name in found)
    assert sorted(probes(ast.parse(code))) == [("C.m", "a"), ("C.m", "b")]


def test_no_module_asks_for_the_class_of_another_modules_part():
    found = set()
    for path, tree in modules().items():
        own = {cls.name for cls in classes(tree)}
        found |= {f"{path}: {inside}: {name}" for inside, name in type_tests(tree) if name not in own}
    check(found, TYPE_TESTS, "give the parts' base class a method or an attribute, and ask every part for it.")


def test_no_module_asks_whether_an_object_has_an_attribute():
    found = {f"{path}: {inside}: {name}" for path, tree in modules().items() for inside, name in probes(tree)}
    check(found, PROBES, "give the base class the attribute, with the default as its value.")


def test_modules_and_functions_are_short():
    lines = {path: (PACKAGE / path).read_text(encoding="utf-8").count("\n") for path in modules()}
    long = {path for path, count in lines.items() if count > MAX_MODULE_LINES}
    check(long, LONG_MODULES, f"a module has at most {MAX_MODULE_LINES} lines: split it by what its parts do.")
    long = {
        f"{path}: {inside}: {node.end_lineno - node.lineno + 1} lines"
        for path, tree in modules().items()
        for inside, node in functions(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long, f"{sorted(long)}: a function has at most {MAX_FUNCTION_LINES} lines."
