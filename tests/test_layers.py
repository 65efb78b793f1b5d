"""The floor plan: nothing imports what stands above it, and no modules import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "opd_gym"
# From the ground up. A module may import its own layer and those below; what is not named here, nothing may import.
LAYERS = (
    (
        "opd_gym.version",
        "opd_gym.checks",
        "opd_gym.files",
        "opd_gym.ranks",
        "opd_gym.tokens",
        "opd_gym.actions",
        "opd_gym.instructions",
        "opd_gym.observations",
        "opd_gym.episodes",
        "opd_gym.untrusted",
    ),
    ("opd_gym.checkpoints",),
    ("opd_gym.policies",),
    ("opd_gym.demonstrations",),
    ("opd_gym.envs",),
    ("opd_gym.versions",),
    ("opd_gym.zoo",),
    ("opd_gym.algorithms",),
    ("opd_gym.evaluation",),
    ("opd_gym.hub",),
    ("opd_gym.cli", "opd_gym.integrations", "opd_gym.zoo.rl_zoo3"),
    ("opd_gym",),
)
# Inside a layer: packages that know nothing of each other
APART = (
    ("opd_gym.envs.libero", "opd_gym.envs.robotwin"),
    ("opd_gym.envs.libero", "opd_gym.envs.workers"),
    ("opd_gym.policies.openvla", "opd_gym.policies.tiny"),
    ("opd_gym.policies.openvla", "opd_gym.policies.vlm"),
)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def type_checking_blocks(tree: ast.Module) -> set[ast.AST]:
    """What is read by type checkers alone is not imported."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(name: str, found: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports, in its functions too."""
    tree = ast.parse(found[name].read_text(encoding="utf-8"))
    unread = type_checking_blocks(tree)
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports are not read here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in found else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: {other for other in imports(name, found) if other in found and other != name} for name in found}


def layer(name: str) -> int:
    # The roof is opd_gym itself, and not every opd_gym.*
    found = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS[:-1])
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    assert found or name == "opd_gym", f"{name} has no place in LAYERS"
    # The longest says most
    return max(found)[1] if found else len(LAYERS) - 1


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for other in edges[left.pop()]:
                if other not in seen:
                    seen.add(other)
                    left.append(other)
        return seen

    reach = {name: reachable(name) for name in edges}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in edges if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def test_no_import_runs_up():
    up = [f"{name} -> {other}" for name, others in graph().items() for other in others if layer(other) > layer(name)]
    assert not up, "\n".join(sorted(up))


def test_no_circles():
    assert not circles(graph())


def test_neighbours_are_apart():
    edges = graph()
    for pair in APART:
        for here, there in (pair, pair[::-1]):
            wrong = [
                (name, other)
                for name in edges
                if name.startswith(here)
                for other in edges[name]
                if other.startswith(there)
            ]
            assert any(name.startswith(here) for name in edges) and not wrong, wrong


def test_the_test_sees_them():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circles(edges) == [["b", "c"]]
    found = modules()
    assert "opd_gym.envs.robotwin.install" in set(imports("opd_gym.cli.main", found)), "an import inside a function"
    assert layer("opd_gym.version") < layer("opd_gym.versions") < layer("opd_gym")


def test_no_test_module_imports_another():
    """What tests share is in modules that are no tests, and in conftest.py: each file runs, and changes, alone."""
    here = Path(__file__).parent
    tests = {path.stem: path for path in here.rglob("test_*.py")}
    assert "test_layers" in tests
    wrong = []
    for name, path in {**tests, "conftest": here / "conftest.py"}.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            source = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = {part for name in names + source for part in name.split(".")}
            wrong += [f"{name} imports {other}" for other in sorted(parts & tests.keys())]
    assert not wrong
