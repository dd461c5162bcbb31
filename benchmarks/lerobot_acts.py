"""Evaluate a policy of `lerobot-train` in the loop of `evaluate.py`; see `benchmarks/simulators.py`.

    python benchmarks/lerobot_acts.py OUTPUT_DIR --dataset DATASET --env metaworld:push-v3 --sample-steps 1

For policies that see only the current observation, such as ACT. LeRobot's own model and processors compute
the chunk, and as much of it is executed as LeRobot would execute.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
from common.checkpoint import PolicySpec
from common.config import cli
from common.data import ChunkDataset, DataConfig, open_dataset
from common.errors import UserError


def main(config: evaluate.Config) -> None:
    policy = LeRobotPolicy(config.run, config.dataset)
    config = replace(config, execute_steps=policy.execute_steps)
    folder = config.run / "evaluation"
    folder.mkdir(exist_ok=True)
    results = {"env": config.simulator.env, "seed": config.seed, "parameters": policy.parameters}
    results["closed_loop"] = dict(evaluate.evaluate_closed_loop(policy, config, folder))
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, found in results["closed_loop"].items():
        print(f"success, {name}: {evaluate.in_words(found)}")


class LeRobotPolicy:
    """The policy interface of `common.rollout` for LeRobot's model and processors; see `RobotPolicy`."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, dataset: tuple[str, ...]):
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        path = folder / "checkpoints" / "last" / "pretrained_model"
        if not path.is_dir():
            raise UserError(f"{folder} holds no policy of lerobot-train: there is no {path}.")
        config = PreTrainedConfig.from_pretrained(path)
        if config.n_obs_steps > 1:
            raise UserError(
                f"{folder}: a policy of type {config.type} sees {config.n_obs_steps} observations, not one."
            )
        self.model = get_policy_class(config.type).from_pretrained(path).eval()
        self.before, self.after = make_pre_post_processors(config, pretrained_path=str(path))
        self.horizon, self.execute_steps = config.chunk_size, config.n_action_steps
        self.parameters = sum(p.numel() for p in self.model.parameters())
        store = open_dataset(DataConfig(dataset=dataset))
        self.spec = PolicySpec.of(ChunkDataset(store, range(store.num_episodes), self.horizon))
        self.state_dim = self.spec.state_dim

    @torch.no_grad()
    def act_batch(
        self, observations: Sequence[Mapping], sample_steps=None, clip: bool = False, generators=None
    ) -> np.ndarray:
        """Chunks (B, T, A) in recorded units."""
        batch = {
            key: torch.stack([self._picture(seen["images"], name) for seen in observations])
            for name, key in zip(self.spec.cameras, self.spec.camera_keys, strict=True)
        }
        states = np.stack([seen["state"][-1] for seen in observations])
        batch["observation.state"] = torch.from_numpy(states)
        return self.after(self.model.predict_action_chunk(self.before(batch))).numpy()

    def _picture(self, images: Mapping, name: str) -> torch.Tensor:
        """(3, H, W) in [0, 1], as in LeRobot's datasets."""
        frames = {self.spec.camera(key): frame for key, frame in images.items()}
        return torch.from_numpy(frames[name]).permute(2, 0, 1).float() / 255


def make(dataset: Path, options: Mapping) -> tuple:
    """The dataset, a new ACT and its processors, as `lerobot-train` makes them."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import make_dataset
    from lerobot.policies.factory import make_policy, make_policy_config, make_pre_post_processors

    offline = {"device": "cpu", "push_to_hub": False, "pretrained_backbone_weights": None}
    config = make_policy_config("act", **offline, **options)
    pipeline = TrainPipelineConfig(
        DatasetConfig(repo_id=f"local/{dataset.name}", root=str(dataset)), policy=config
    )
    data = make_dataset(pipeline)
    policy = make_policy(config, ds_meta=data.meta)
    return data, policy, *make_pre_post_processors(config, dataset_stats=data.meta.stats)


@torch.no_grad()
def begin(dataset: Path, options: Mapping, seed: int, folder: Path, pictures: int = 64) -> None:
    """Write a new ACT, from which `lerobot-train --policy.path` starts.

    LeRobot's ResNet has batch norms that never learn. With random weights they would do nothing at all, as
    LeRobot never uses them: here they get the statistics of the demonstrations, layer by layer.
    """
    torch.manual_seed(seed)
    data, policy, before, after = make(dataset, options)
    some = torch.utils.data.DataLoader(data, batch_size=pictures, shuffle=True)
    batch = before(next(iter(some)))
    images = torch.cat([batch[key] for key in policy.config.image_features])

    def take_statistics(norm: torch.nn.Module, inputs: tuple) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], dim=(0, 2, 3))

    norms = [m for m in policy.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    policy.model.backbone(images)
    for hook in hooks:
        hook.remove()
    policy.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)


def training_steps(dataset: Path, options: Mapping) -> Iterator[None]:
    """What `lerobot-train` does for each batch of 8 with its ACT; yields after every step."""
    data, policy, before, _ = make(dataset, options)
    policy.train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    while True:
        for batch in torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, drop_last=True):
            loss, _ = policy(before(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            yield


if __name__ == "__main__":
    cli(main, evaluate.Config)
