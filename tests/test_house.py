"""Rules of the house that a reviewer would otherwise have to remember. Raising a number needs a line in docs/decisions.md."""

import ast
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from esolm_megatron.config import tree as config
from esolm_megatron.data import prepare

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "esolm_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALL = [*MODULES, *sorted((ROOT / "checkpoints_conversion").rglob("*.py"))]

LINES_PER_FILE = 500
CODE_LINES = {
    "the core": (
        7350,
        "model objective parallel train checkpoint config errors terminal topology lazy version",
    ),
    "data": (3250, "data"),
    "inference": (2400, "inference huggingface sample score"),
    "evaluation, plans and simulated ranks": (2200, "evaluation plan simulation"),
    "what starts and watches runs": (2900, "launch doctor commands cli __init__ __main__"),
}
"""Most lines of code in each part, and the part's files and folders."""


def lines(path):
    return len(path.read_text().splitlines())


def test_no_file_is_longer_than_one_sitting():
    assert {str(p.relative_to(ROOT)): lines(p) for p in MODULES if lines(p) > LINES_PER_FILE} == {}


def code_lines(path):
    """Lines without blanks, comments and docstrings: explaining more must not cost anything."""
    text = path.read_text()
    explained = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            explained.update(range(node.lineno, node.end_lineno + 1))
    return sum(
        1 for number, line in enumerate(text.splitlines(), 1)
        if number not in explained and line.strip() and not line.strip().startswith("#")
    )  # fmt: skip


def part_of(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    (part,) = [part for part, (_, names) in CODE_LINES.items() if name in names.split()]
    return part


@pytest.mark.parametrize("part", CODE_LINES)
def test_each_part_can_be_read_in_a_sitting(part):
    assert 1000 < sum(code_lines(p) for p in MODULES if part_of(p) == part) <= CODE_LINES[part][0]


@pytest.mark.parametrize("word", ["utils", "util", "common", "helpers", "helper", "misc"])
def test_no_module_is_a_drawer_for_everything(word):
    assert not [p for p in ALL if p.stem == word or p.parent.name == word]


def architecture():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "tools" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_files_and_no_rooms_import_each_other_in_a_circle():
    drawing = architecture()
    graph = drawing.imports()
    assert len(graph) > 100
    assert "esolm_megatron.launch.submit" in graph["esolm_megatron.commands.jobs"], "imports inside of functions count"
    assert "esolm_megatron.config.tree" in graph["esolm_megatron.config"], "those for type checkers too"
    drawing.floors(graph)
    assert len(drawing.floors(drawing.rooms(graph))) < 11
    with pytest.raises(ValueError, match="in a circle: b, c"):
        drawing.floors({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()})


def test_the_picture_of_rooms_shows_what_is_imported(tmp_path):
    from PIL import Image

    drawing = architecture()
    with Image.open(drawing.PICTURE) as picture:
        drawn = picture.info.get(drawing.FACTS)
    assert drawn == drawing.digest(drawing.facts()), "run python tools/draw_architecture.py again"
    assert drawing.PICTURE.stat().st_size < 200_000
    drawing.draw(tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 50_000


def test_no_two_modules_have_the_same_name():
    names = Counter(p.stem for p in ALL if not p.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def calls_of(tree, name):
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]


def test_only_the_command_line_prints():
    found = {
        str(p.relative_to(ROOT)): at
        for p in MODULES
        if p.parent.name != "commands" and (at := calls_of(ast.parse(p.read_text()), "print"))
    }
    assert found == {}


def sections():
    """What a user writes: the tree of a run, and that of prepared data."""
    found = [config.Config, prepare.PrepareConfig]
    for section in found:
        kinds = [field.annotation for field in section.model_fields.values()]
        found += [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, config.Section)]
    return found


def test_every_field_of_the_configuration_is_explained():
    assert {config.ModelConfig, config.LogConfig} <= set(sections())
    bare = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not field.description and field.annotation not in sections()  # a section explains itself
    ]
    assert bare == []
    assert all(section.__doc__ for section in sections())


def test_every_section_is_frozen_and_refuses_unknown_names():
    for section in sections():
        assert section.model_config["frozen"], section
        assert section.model_config["extra"] == "forbid", section


def tracked():
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        listed = [
            str(p.relative_to(ROOT)) for p in ROOT.glob("*/**/*.*") if not p.parts[len(ROOT.parts)].startswith(".")
        ]
    return [ROOT / name for name in listed]


TEXT = {".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".json", ".cfg", ""}
MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home|Users|scratch|mnt|data)/\w|(?<!\w)~/\w")


def test_no_path_of_a_machine_is_written_down():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        if path.suffix in TEXT and path.is_file() and path.stat().st_size < 1_000_000
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert found == []


def test_scripts_are_executable():
    for name in (".ci/run", "tools/test.sh"):
        assert (ROOT / name).stat().st_mode & 0o111, name


def test_checks_run_in_test_sh_and_ci_calls_it():
    script = (ROOT / "tools/test.sh").read_text()
    for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest"):
        assert tool in script, tool
    assert "tools/test.sh" in (ROOT / ".ci/run").read_text()


def test_nothing_that_users_name_is_read_as_markup():
    """One console for all prints; columns of progress bars are told, too."""
    for path in ALL:
        text = path.read_text()
        if path.name != "terminal.py":
            assert not re.search(r"(?<!\w)(console\.)?Console\(", text), path
            assert "from_markup" not in text, path
        for column in re.findall(r"TextColumn\([^)]*\)", text):
            assert "markup=False" in column, f"{path}: {column}"
