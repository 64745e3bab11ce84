"""Nothing in the sources loads what may run code, hands text to a shell, or reaches for what cannot be checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.walkthrough import REPOSITORY

SOURCES = sorted(
    path
    for folder in ("vnet_core", "workers", "flows", "benchmarks", "infra")
    for path in (REPOSITORY / folder).rglob("*.py")
)
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval", "builtins.exec"}
ONLY_IF = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
"""Calls that must say this keyword with this value."""
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def findings(source: str) -> Iterator[str]:
    """What is unsafe, one line each with its number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [module] if module else [alias.name for alias in node.names]
            yield from (f"{node.lineno}: import of {name}" for name in names if name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {found}" for found in _of_call(node))


def _of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    said = {keyword.arg: keyword.value for keyword in node.keywords}

    def constant(name: str) -> object:
        value = said.get(name)
        return value.value if isinstance(value, ast.Constant) else value

    if called in NEVER:
        yield called
    if called in ONLY_IF and (constant(ONLY_IF[called][0]) is not ONLY_IF[called][1]):
        yield f"{called} without {ONLY_IF[called][0]}={ONLY_IF[called][1]}"
    if called.endswith((".load", ".loads")) and called.partition(".")[0] in PICKLES:
        yield called
    elif constant("allow_pickle") is True:
        yield "allow_pickle=True"
    if "shell" in said and constant("shell") is not False:
        yield "shell"
    if called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
        loader = ast.unparse(said["Loader"]) if "Loader" in said else ""
        if loader.rpartition(".")[2] not in SAFE_LOADERS:
            yield called
    if called.endswith((".extractall", ".unpack_archive")):
        yield called
    if called.endswith("tempfile.mktemp") or called == "mktemp":
        yield called
    if constant("verify") is False:
        yield "verify=False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_a_source_calls_nothing_unsafe(path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(path)",
        "tempfile.mktemp()",
        "requests.get(url, verify=False)",
    ],
)
def test_the_search_knows_what_is_unsafe(line: str) -> None:
    assert list(findings(f"def f():\n    {line}\n"))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "network.eval()",
        "re.compile(text)",
        "json.loads(text)",
        "safetensors.torch.load(content)",
        "subprocess.run([text], shell=False)",
    ],
)
def test_the_search_leaves_the_rest_alone(line: str) -> None:
    assert list(findings(line)) == []
