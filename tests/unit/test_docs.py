"""What the pages say exists: targets, commands and their options, files, links, names of the environment."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
import yaml
from orderflow.cli.main import COMMANDS
from orderflow.config import ENVIRONMENT
from orderflow.lake.layout import kinds
from orderflow.paths import ROOT
from orderflow.topics import TOPICS
from orderflow.venues.binance.normaliser import REJECT_REASONS

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"runs", "build"}


def code_of(text: str) -> str:
    """What a reader would type: blocks and spans of code, a line each, without comments."""
    pieces = [*CODE.findall(text), *INLINE.findall(CODE.sub("", text))]
    return "\n".join(re.sub(r"\s+#.*", "", line) for piece in pieces for line in piece.splitlines())


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


def parser_of(command: str) -> argparse.ArgumentParser:
    subparsers = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(COMMANDS[command]).add_parser(subparsers)
    parser: argparse.ArgumentParser = subparsers.choices[command]
    return parser


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Options of a command and of its tasks."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for task in action.choices.values():
                found |= options_of(task)
    return found


def anchors(page: Path) -> set[str]:
    """Anchors as the usual renderers make them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_begins_with_the_demo() -> None:
    assert "make demo" in README
    assert README.index("make demo") < README.index("orderflow lake sql") < README.index("orderflow verify")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_targets_exist(page: Path) -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of(page.read_text("utf-8"))))
    assert named <= targets()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    for line in code_of(page.read_text("utf-8")).splitlines():
        if line.startswith(("class ", "import ", "from ")):
            continue
        for command, rest in re.findall(r"(?:^|[ /;])orderflow ([a-z]+)([^|;]*)", line):
            if line.strip().startswith(("git clone", "kubectl")):  # the name of a folder, of a namespace
                continue
            assert command in COMMANDS, f"{line!r} names no command of orderflow"
            options = set(re.findall(r"(?<=\s)--[a-z-]+", re.sub(r'"[^"]*"', "", rest)))
            unknown = options - options_of(parser_of(command))
            assert not unknown, f"{line!r}: orderflow {command} has no option {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    paths = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(FOLDERS))})/[\w./-]*)", code_of(text)))
    gone = sorted(path for path in paths if not (ROOT / path.rstrip("/.")).exists() and not _an_example(path))
    assert not gone


def _an_example(path: str) -> bool:
    """Folders that hold what the user adds."""
    return path.startswith("infra/config/overrides.d/")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{path or page.name} has no heading #{anchor}"


def test_every_page_is_linked() -> None:
    """A page nobody can reach from the README is not there; decisions are reached by their folder."""
    reached: set[Path] = set()
    queue = [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for link in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
            if not re.match(r"[a-z]+:", link):
                queue.append((page.parent / link.partition("#")[0]).resolve())
    lost = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.resolve() not in reached]
    assert not lost


def test_environment_names_are_complete_and_known() -> None:
    text = (ROOT / ".env.example").read_text("utf-8")
    listed = set(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=", text, re.MULTILINE))
    assert set(ENVIRONMENT) <= listed
    code = "\n".join(
        path.read_text("utf-8") for folder in ("libs", "services", "tests") for path in (ROOT / folder).rglob("*.py")
    )
    read_by_name = set(
        re.findall(
            r'(?:environ(?:\.get\(|\[)|environment\.get\(|add\("--[a-z-]+", |^ +)"([A-Z]+_[A-Z_]+)"', code, re.MULTILINE
        )
    )
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    of_the_broker = set(yaml.safe_load(compose)["services"]["kafka"]["environment"])
    mine = {name for name in read_by_name if name.startswith(("KAFKA_", "ORDERFLOW_", "SCHEMA_", "SIM_"))}
    assert mine - {"ORDERFLOW_ROOT"} - of_the_broker <= listed
    composed = set(re.findall(r"\$\{([A-Z_]+)", compose))
    assert composed <= listed
    unknown = sorted(name for name in listed - composed if f'"{name}"' not in code)
    assert not unknown, "named in .env.example and read nowhere"


def test_environment_example_can_be_taken_as_it_is() -> None:
    from orderflow.config import load

    pairs = re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE)
    assert load(dict(pairs)) == load({})


def test_environment_example_names_the_defaults_of_compose() -> None:
    """What stands there as a comment is what holds where the name is not set."""
    text = (ROOT / ".env.example").read_text("utf-8")
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    section = text[text.index("--- docker compose alone") : text.index("--- tests")]
    shown = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", section, re.MULTILINE))
    used = {
        name: {default for each, default in re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose) if each == name}
        for name in shown
    }
    assert used == {name: {default} for name, default in shown.items()}


def test_topics_and_kinds_are_described() -> None:
    topics = (ROOT / "docs" / "topics.md").read_text("utf-8")
    for topic in TOPICS:
        assert f"`{topic.name}`" in topics or topic.name.startswith("state.")
    for reason in REJECT_REASONS:
        assert f"`{reason}`" in topics
    lake = (ROOT / "docs" / "lake.md").read_text("utf-8")
    for name in (*kinds(), "raw"):
        assert f"| `{name}` |" in lake


def test_metrics_to_look_at_first_are_in_the_list() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    table = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)[`{]", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    listed = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert len(named) > 5
    assert not [name for name in named if not re.search(rf"`{name}[`{{]", listed)]


def test_figures_of_the_recorder_are_those_of_its_status() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    table = page.partition("\n## The recorder\n")[2].partition("\n## ")[0]
    rows = "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    code = (ROOT / "libs" / "orderflow" / "ingest" / "websocket_recorder.py").read_text("utf-8")
    status = set(re.findall(r'^ +"([a-z_]+)": ', code.partition("def status(")[2], re.MULTILINE))
    described = set(re.findall(r"`([a-z_]+)`", rows)) - {"recorder"}
    assert len(described) > 8
    assert described <= status


def test_columns_of_the_lake_are_as_described() -> None:
    """Where the page gives a list of columns, it is the file's."""
    lake = (ROOT / "docs" / "lake.md").read_text("utf-8")
    trust = re.search(r"\*Trust\* is `([^`]+)`", lake)
    assert trust is not None
    described = re.findall(r"^\| `(\w+)` \|[^|]*\| `([a-z_ ]{30,})`( \+ trust)?", lake, re.MULTILINE)
    assert len(described) >= 7
    for name, columns, trusted in described:
        if name == "raw":
            continue
        expected = columns.split() + (trust[1].split() if trusted else [])
        assert expected == kinds()[name].schema.names, name
