"""Everything that README.md and docs/ refer to exists: links, anchors, files, scripts and their flags."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
COMMAND = re.compile(r"(?:accelerate launch|torchrun|python) (?:.*?\s)??((?:\w+/)*\w+\.py)\b(.*)")
OTHERS = {"trainer/offline_trainer.py", "examples/extensions/"}  # files of the framework in moving.md


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """(script, flags) of each command in a page's code blocks; continued lines are joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [match.groups() for match in map(COMMAND.search, lines) if match]
    return [(script, re.findall(r" (--[\w-]+)", rest.partition("#")[0])) for script, rest in found]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@EVERY_PAGE
def test_links_and_anchors_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    broken = []
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@EVERY_PAGE
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:benchmarks|common|configs|docs|examples|tests|tools)/[\w./*]+)`", prose(page))
    ours = [name for name in named if name not in OTHERS and not re.search("METHOD|SCRIPT", name)]
    assert not [name for name in ours if not any(ROOT.glob(name.rstrip("/")))]


@EVERY_PAGE
def test_commands_name_scripts_and_flags_that_exist(page):
    shared = "\n".join(path.read_text() for path in sorted((ROOT / "common").rglob("*.py")))
    for script, flags in commands(page):
        if script in OTHERS:
            continue
        script = script.replace("train_mine", "train_vfp")  # the fork that the pages ask readers to make
        assert (ROOT / script).is_file(), script
        options = (ROOT / script).read_text() + shared
        for flag in flags:
            name = flag[2:].replace("-", "_")
            assert re.search(rf"^ +{name}: ", options, re.MULTILINE), f"{script} {flag}"


def test_the_list_of_benchmarks_is_complete():
    listed = (ROOT / "docs" / "benchmarks.md").read_text().partition("## All benchmarks")[2]
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == set(
        re.findall(r"`benchmarks/(\w+\.py)`", listed)
    )


def test_the_checks_see_what_they_check():
    readme = PAGES[0]
    assert ("train_vfp.py", ["--run-dir", "--resume"]) in commands(readme)
    assert "several-processes" in anchors(ROOT / "docs" / "running.md")
