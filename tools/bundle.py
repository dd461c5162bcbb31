"""Build hooks of the distributions `lerobot_policy_flow` and `lerobot_env_flow`, called by hatchling.

A distribution carries `common/` and the training scripts inside its own package: building the wheel copies
them and turns `from common...` into `from lerobot_policy_flow.common...`, since a top-level package called
`common` could clash with others. It depends on what requirements.txt lists, minus what only training needs.
"""

import ast
import re
import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).resolve().parents[1]
FOR_TRAINING = {"pytest", "wandb", "tensorboard", "schedulefree"}
OURS = re.compile(r"^(\s*(?:from|import)\s+)(common)\b(?=[.\s])", re.MULTILINE)


class Bundle(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        package = self.metadata.core.raw_name
        if version == "editable":
            raise RuntimeError(f"{package} cannot be editable: install it without -e after each change.")
        if not (ROOT / "common").is_dir():
            raise RuntimeError(
                f"{package} must be built in its repository: `uv build --wheel`, or pip install DIR."
            )
        self.made = Path(tempfile.mkdtemp(prefix="bundle."))
        own = {path.name: path for path in Path(self.root).glob("*.py")}
        for name, path in {**own, **carried(self.config.get("scripts", False))}.items():
            target = self.made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rewritten(path.read_text(), package, path))
        shutil.copy(ROOT / "LICENSE", self.made)
        build_data["force_include"][str(self.made)] = package

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        shutil.rmtree(self.made)


def carried(scripts: bool) -> dict[str, Path]:
    """Files of the repository that a distribution carries, by their path in the package."""
    files = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "common").rglob("*.py"))}
    if scripts:  # those that train a policy
        policies = [
            path for path in sorted(ROOT.glob("train_*.py")) if "\ndef sample_actions(" in path.read_text()
        ]
        files |= {path.name: path for path in policies}
    return files


def rewritten(text: str, package: str, path: Path) -> str:
    """Python source that imports `common` from inside a package."""
    text = OURS.sub(rf"\1{package}.\2", text)
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(module.partition(".")[0] == "common" for module in modules):
            raise RuntimeError(f"{path}:{node.lineno} imports common in a way that cannot be bundled.")
    return text


class Requirements(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        """What the package needs, from the repository's files."""
        lines = [
            line.partition("#")[0].strip()
            for name in self.config["files"]
            for line in (ROOT / name).read_text().splitlines()
        ]
        needed = [line for line in lines if line and re.split(r"[\[<>=!~]", line)[0] not in FOR_TRAINING]
        metadata["dependencies"] = needed
