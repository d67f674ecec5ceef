"""How the code is built, in numbers: what an addition touches, and what would make it harder.

    python benchmarks/house.py [ROOT]

prints them for this repository, or for another checkout of it, such as the version before. Everything is read from the
sources; nothing is imported.
"""

import argparse
import ast
import collections
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qlora_jax"
MOST_PARAMETERS, MOST_LINES = 7, 300
# Launchers of kernels take their operands one by one, command lines their options.
FREE = ("kernels/", "cli/")
KINDS = re.compile(r"\b(NF4\w*|Int8\w*|MXFP4\w*|Mixed\w*|Packed\w*|Experts|HostTable|RowAdapters|Quantized)\b")
# Where an answer stands in the code is found by what only that answer would write.
WORDS = {
    "name the config field mlp_chunk": r"\bmlp_chunk\b",
    "multiply by A and B": r"\.\.\.K,rK|BTK,BrK|@ weight\.A\.T|B\.astype\((np|jnp)\.float32\) @",
    "run the model on a batch": r"model\.hidden(_and_balance)?\(",
    "loop over layers to name tensors": r"hf_name\(\w+, |itertools\.product\(\*map\(range",
    "add a program's bytes up to a peak": r"output_size_in_bytes\b(?!:)",
}


def sources(root: Path) -> dict[str, str]:
    """The package's files by their paths below it."""
    package = root / PACKAGE
    return {str(file.relative_to(package)): file.read_text() for file in sorted(package.rglob("*.py"))}


def naming(files: dict[str, str], pattern: str) -> list[str]:
    """The files in which a pattern occurs."""
    return [name for name, text in files.items() if re.search(pattern, text)]


def ladders(files: dict[str, str]) -> list[str]:
    """Places that ask a stored weight for its kind, outside the folders that own the kinds."""
    own = ("quant/", "kernels/", "nf4/", "int8/")
    return [
        f"{name}:{number}"
        for name, text in files.items()
        if not name.startswith(own)
        for number, line in enumerate(text.splitlines(), 1)
        if "isinstance(" in line and KINDS.search(line)
    ]


def long_signatures(files: dict[str, str]) -> list[str]:
    """Functions that declare more than MOST_PARAMETERS parameters."""
    found = []
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not name.startswith(FREE):
                count = len(parameters(node))
                if count > MOST_PARAMETERS:
                    found.append(f"{name}:{node.name} ({count})")
    return found


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """What a function declares, `self` included."""
    own = node.args
    return [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]


def imports(files: dict[str, str]) -> dict[str, set[str]]:
    """Which files a file imports, by their paths."""
    modules = {
        f"{PACKAGE}.{name.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}": name for name in files
    }
    found: dict[str, set[str]] = collections.defaultdict(set)
    for name, text in files.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
                found[name] |= {modules[module] for module in wanted if module in modules} - {name}
    return found


def circles(files: dict[str, str]) -> list[str]:
    """Files that reach themselves by what they import when they are loaded; packages' own lists left out."""
    graph = {
        name: {one for one in reached if not one.endswith("__init__.py")} for name, reached in imports(files).items()
    }

    def reaches(start: str) -> bool:
        seen: set[str] = set()
        rest = set(graph.get(start, ()))
        while rest:
            here = rest.pop()
            if here == start:
                return True
            seen.add(here)
            rest |= graph.get(here, set()) - seen
        return False

    return [name for name in files if not name.endswith("__init__.py") and reaches(name)]


def additions(root: Path) -> dict[str, list[str]]:
    """What docs/architecture.md lists under "Where do I add": the files that an addition changes or creates."""
    page = root / "docs" / "architecture.md"
    _, _, rest = page.read_text().partition("## Where do I add")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", rest.partition("\n## ")[0], re.MULTILINE)
    return {what: re.findall(r"`([^`]+\.py)`", files) for what, files in rows if ".py" in files}


def report(root: Path) -> None:
    """Prints everything."""
    files = sources(root)
    for words, pattern in WORDS.items():
        found = naming(files, pattern)
        print(f"{len(found):3} files {words}: {', '.join(found)}")
    for words, found in (
        ("places ask a weight for its kind outside quant/ and kernels/", ladders(files)),
        (f"functions declare more than {MOST_PARAMETERS} parameters", long_signatures(files)),
        (f"files have more than {MOST_LINES} lines", [n for n, t in files.items() if len(t.splitlines()) > MOST_LINES]),
        ("files import in a circle", circles(files)),
    ):
        print(f"{len(found):3} {words}: {', '.join(found)}")
    for what, listed in additions(root).items():
        print(f"{len(listed):3} files for {what}: {', '.join(listed)}")


def main() -> None:
    parser = argparse.ArgumentParser("house.py", description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="a checkout; this one where it is left out")
    report(parser.parse_args().root)


if __name__ == "__main__":
    main()
