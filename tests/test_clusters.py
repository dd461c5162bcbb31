"""The files in docs/clusters.md: shells and YAML parse them, and scripts know their flags."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import train_vfp
from common.config import flat_options

TEXT = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()
BLOCKS = re.findall(r"```(bash|yaml)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_files_for_clusters_can_be_read(language, text):
    if language == "bash":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        commands = text
    else:
        last = list(yaml.safe_load_all(text))[-1]
        commands = last.get("run") or last["spec"]["template"]["spec"]["containers"][0]["args"][0]
    commands = re.findall(r"train_vfp\.py (.*)", commands.replace("\\\n", " "))
    assert commands
    for command in commands:
        flags = {flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z][a-z-]*", command)}
        assert flags <= flat_options(train_vfp.Config()).keys()
        assert "resume" in flags or "launch_ray.py" in text


def test_every_file_is_tried():
    assert [language for language, _ in BLOCKS] == ["bash", "bash", "bash", "yaml", "yaml", "bash"]
