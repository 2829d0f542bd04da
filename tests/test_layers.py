"""Rules that can be read off the source: who may import whom, sizes, randomness."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "patchdiffusion"
MOST_LINES = 400

# A file imports from lower layers and from names before its own in the same layer. A name is a
# file or a folder; files within one folder may import each other, but not in circles.
LAYERS: tuple[str, ...] = (
    "system",
    "cond rng paths betas",
    "noise weighting preconditioning straight tabled asymflow parameterisation",
    "patches sizes planbase multigrid plans denoiser classifier flowmap losses analytic",
    "nets encoders",
    "solvers guidance accel objectives data conditioners model adapted",
    "sampling metrics",
    "train",
    "apps interop",
    "recipes cli api",
)
ORDER = [name for layer in LAYERS for name in layer.split()]
EXEMPT = {"", "__main__"}  # the public names, and `python -m patchdiffusion`

# Draws that take a generator, and what of numpy.random has no state of its own.
DRAWS = {
    "bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm",
}  # fmt: skip
SEEDING = {"manual_seed", "seed", "set_rng_state"}
STATELESS = {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}


def sources(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    """patchdiffusion/nets/unet.py -> nets.unet, patchdiffusion/nets/__init__.py -> nets."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sources("patchdiffusion")}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported, also inside functions; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{name.name}" for name in node.names)


def edges(tree: ast.AST) -> set[str]:
    """Modules of the package that are imported; "" is the package itself."""
    found = set()
    for name in imports(tree):
        if name.startswith("."):
            found.add(name)
        elif name.split(".")[0] == "patchdiffusion":
            inner = name.split(".")[1:]
            while inner and ".".join(inner) not in MODULES:
                inner.pop()  # a name inside a module
            found.add(".".join(inner))
    return found


def complaints_about_imports(module: str, tree: ast.AST) -> list[str]:
    own = module.split(".")[0]
    if own not in ORDER:
        return [f"patchdiffusion/{own} is in no layer: add it to the list in tests/test_layers.py"]
    out = []
    for target in sorted(edges(tree)):
        name = target.split(".")[0]
        if target.startswith("."):
            out.append(f"{module} imports {target}: write the full name")
        elif not name and own not in LAYERS[-1].split():
            out.append(f"{module} imports names of patchdiffusion/__init__.py: name the file")
        elif name not in ("", own) and (name not in ORDER or ORDER.index(name) > ORDER.index(own)):
            out.append(f"{module} imports {target}, which is not below it")
    return out


def complaints_about_randomness(tree: ast.AST) -> list[str]:
    """Calls that read or write a global generator."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(n.name == "random" for n in node.names):
            out.append(f"line {node.lineno}: import random")
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            out.append(f"line {node.lineno}: from {node.module} import")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
            "np.random",
            "numpy.random",
        ):
            if node.attr not in STATELESS:
                out.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg for k in node.keywords}
            first, last = name.split(".")[0], name.rsplit(".", 1)[-1]
            if first == "torch" and "(" not in name:
                if last in SEEDING or (last in DRAWS and "generator" not in given):
                    out.append(f"line {node.lineno}: {name} without a generator")
            elif last in ("default_rng", "Philox", "PCG64") and not (node.args or given):
                out.append(f"line {node.lineno}: {name} without a seed")
    return out


def parse(text: str) -> ast.AST:
    return ast.parse(text)


# ---- The source ----


@pytest.mark.parametrize("module", sorted(set(MODULES) - EXEMPT))
def test_imports_go_down(module: str) -> None:
    assert not complaints_about_imports(module, parse(MODULES[module].read_text()))


def test_imports_have_no_circles() -> None:
    graph = {m: edges(parse(f.read_text())) - {m} for m, f in MODULES.items() if m}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "file", sources("patchdiffusion"), ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_no_global_generator(file: Path) -> None:
    assert not complaints_about_randomness(parse(file.read_text()))


def test_torchvision_is_never_imported() -> None:
    for file in sources("patchdiffusion", "tests", "examples", "benchmarks"):
        names = {name.split(".")[0] for name in imports(parse(file.read_text()))}
        assert "torchvision" not in names, f"{file} imports torchvision"


def test_files_are_short_and_ascii() -> None:
    for file in sources("patchdiffusion", "tests", "examples", "benchmarks"):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        assert len(lines) <= MOST_LINES, f"{file} has {len(lines)} lines"
        foreign = [number for number, line in enumerate(lines, 1) if not line.isascii()]
        assert not foreign, f"{file} has characters outside ASCII in lines {foreign}"


# ---- The rules themselves ----


def test_the_order_of_layers_has_no_doubles() -> None:
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("cond", "from patchdiffusion.denoiser import EDM", "imports denoiser, which is not below"),
        ("noise", "import patchdiffusion.patches", "imports patches, which is not below it"),
        ("noise", "from patchdiffusion import patches", "imports patches, which is not below it"),
        ("noise", "def f():\n    from patchdiffusion import patches", "which is not below it"),
        ("losses", "from patchdiffusion import PatchPlan", "name the file"),
        ("losses", "from .cond import Cond", "write the full name"),
        ("oddity", "", "oddity is in no layer"),
        ("nets.unet", "from patchdiffusion.sampling import x", "imports sampling"),
    ],
)
def test_a_wrong_import_is_seen(module: str, text: str, complaint: str) -> None:
    (found,) = complaints_about_imports(module, parse(text))
    assert complaint in found


def test_right_imports_pass() -> None:
    for module, text in (
        ("plans", "from patchdiffusion import rng\nfrom patchdiffusion.noise import LogNormal"),
        ("nets.unet", "from patchdiffusion.nets.layers import Conv\nimport torch"),
        ("sampling", "from patchdiffusion.guidance.cfg import CFG"),
    ):
        assert complaints_about_imports(module, parse(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.manual_seed(0)", "torch.cuda.manual_seed_all(0)\ntorch.cuda.manual_seed(0)",
        "torch.randn(3)", "torch.randint(3, (2,), device='cpu')", "torch.randn_like(x)",
        "np.random.rand(3)", "numpy.random.seed(0)", "np.random.default_rng()",
        "import random", "from random import choice", "from numpy.random import rand",
        "def f():\n    return torch.rand(3)",
    ],
)  # fmt: skip
def test_a_global_draw_is_seen(text: str) -> None:
    assert complaints_about_randomness(parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "torch.randn(3, generator=g)", "torch.Generator().manual_seed(3)",
        "np.random.Generator(np.random.Philox(key=3))", "np.random.default_rng(3)",
        '"""torch.randn(3) in a docstring"""', "rng.normal(key, (3,))",
    ],
)  # fmt: skip
def test_a_keyed_draw_passes(text: str) -> None:
    assert complaints_about_randomness(parse(text)) == []


def test_first_lines_of_docstrings_name_things() -> None:
    """A noun phrase or an imperative says more than "What it does"."""
    riddles = re.compile(r"(What|Where|How|Which|Who|Why|The same) ")
    found = [
        f"{file.relative_to(ROOT)}: {text.splitlines()[0]}"
        for file in sorted((ROOT / "patchdiffusion").rglob("*.py"))
        for node in ast.walk(parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for text in [node.value.value]
        if isinstance(text, str) and riddles.match(text)
    ]
    assert found == []
