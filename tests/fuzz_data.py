"""Fuzz the readers with mutated datasets: no crash, no hang, no batch that differs from the file.

    python tests/fuzz_data.py --minutes 10        # prints the outcomes

Every example takes a small dataset, changes bytes of one of its files, and opens it as training would.
Either a `UserError` says in one sentence what is wrong, or the store holds what an independent reading of the
changed file gives. (A flipped bit in a pixel is also flipped in the store: the file cannot show it.)
Every other example keeps the files of a LeRobot dataset valid but makes them contradict each other.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lerobot_mutations
from fuzz_hdf5 import fuzz_layouts
from hdf5_factory import make_hdf5
from lerobot_factory import make_dataset

from common.data import ChunkDataset, DataConfig, open_dataset, workers
from common.errors import UserError

CASES = {  # name: (layout, kind of images); LeRobot datasets have no layout
    "aloha": ("aloha", "array"),
    "gzip": ("aloha", "gzip"),
    "padded": ("aloha", "padded"),
    "grouped": ("grouped", "variable"),
    "robomimic": ("robomimic", "bytes"),
    "video": (None, True),
    "images": (None, False),
}
LENGTHS, SIZE = (5, 4), (16, 24)


def corpus(folder: Path) -> dict[str, Path]:
    """One small valid dataset of every kind."""
    roots = {}
    for name, (layout, images) in CASES.items():
        roots[name] = folder / name
        if layout is None:
            cameras = {"observation.images.cam_high": SIZE}
            make_dataset(roots[name], LENGTHS, cameras, video=images, dims=(3, 3))
        else:
            make_hdf5(roots[name], LENGTHS, {"high": SIZE}, layout, images=images)
    return roots


place = st.floats(0, 1, exclude_max=True)
mutation = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("byte"), place, st.integers(0, 255)),
    st.tuples(
        st.just("number"), place, st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1])
    ),
    st.tuples(st.just("zero"), place, st.integers(1, 64)),
    st.tuples(st.just("cut"), place, st.just(0)),
    st.tuples(st.just("insert"), place, st.integers(1, 32)),
    st.tuples(st.just("copy"), place, place),
)
example = st.tuples(st.sampled_from(sorted(CASES)), place, st.lists(mutation, min_size=1, max_size=6))


def mutate(content: bytes, mutations: list) -> bytes:
    data = bytearray(content)
    for kind, where, value in mutations:
        at = int(where * len(data))
        if kind == "flip" and data:
            data[at] ^= 1 << value
        elif kind == "byte" and data:
            data[at] = value
        elif kind == "number":
            at -= at % 8
            data[at : at + 8] = value.to_bytes(8, "little")
        elif kind == "zero":
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes(value)
        elif kind == "copy":
            source = int(value * len(data))
            data[at : at + 16] = data[source : source + 16]
    return bytes(data)


class Fuzz:
    """Opens mutated datasets and counts the outcomes."""

    def __init__(self, folder: Path):
        self.folder, self.roots = folder, corpus(folder / "corpus")
        lerobot_mutations.corpus(folder / "contradictions")
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def bytes_of(self, case: tuple) -> None:
        """Open a dataset with changed bytes in one of its files."""
        name, which, mutations = case
        work = self._copy(self.roots[name], case)
        files = sorted(path for path in (work / "d").rglob("*") if path.is_file())
        file = files[int(which * len(files))]
        file.write_bytes(mutate(file.read_bytes(), mutations))
        config = DataConfig((str(work / "d"),), cache_dir=work / "cache", fps=10.0, ingest_workers=1)
        self._open(name, config, check_hdf5 if CASES[name][0] else check_lerobot)

    def contradictions(self, case: tuple) -> None:
        """Open a LeRobot dataset that contradicts itself, then again without its unusable episodes."""
        is_video, mutations = case
        name = "video" if is_video else "images"
        work = self._copy(self.folder / "contradictions" / name, case)
        lerobot_mutations.mutate(work / "d", is_video, mutations)
        for skip in (False, True):
            config = DataConfig(
                (str(work / "d"),), cache_dir=work / "cache", skip_bad_episodes=skip, ingest_workers=1
            )
            self._open(f"{name} that contradicts itself", config, lerobot_mutations.check)

    def _copy(self, root: Path, case: tuple) -> Path:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, work / "d")
        (self.folder / "last.txt").write_text(repr(case))  # in case the process dies
        return work

    def _open(self, name: str, config: DataConfig, check) -> None:
        """Open a dataset as training would: it is refused with a sentence, or `check` finds it right."""
        began = time.monotonic()
        refusal = None
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                store = open_dataset(config)
        except UserError as error:
            refusal = str(error)
        self.slowest = max(self.slowest, time.monotonic() - began)
        if refusal is not None:
            assert "\n" not in refusal, refusal
            assert "Traceback" not in refusal, refusal
            assert len(refusal) < 2000, refusal
            assert refusal.endswith("."), refusal
            self.outcomes[f"{name}: refused"] += 1
            self.outcomes["hung"] += "did not end" in refusal
            self.outcomes["crashed"] += "ended with" in refusal
            return
        dataset = ChunkDataset(store, range(store.num_episodes), 3)
        batch = dataset.__getitems__(np.arange(len(dataset)))
        assert batch.images.shape == (store.num_steps, 1, 3, *store.image_size)
        assert np.isfinite(batch.actions.numpy()).all()
        assert np.isfinite(batch.proprio.numpy()).all()
        check(Path(config.dataset[0]), store)
        self.outcomes[f"{name}: accepted"] += 1


def check_hdf5(root: Path, store) -> None:
    """Compare the store with plain reading, in a process that may crash."""
    keys = json.loads((store.path / "meta.json").read_text())["choices"]["choices"]["keys"]
    args = (str(root), keys["state"], keys["action"], store.camera_keys[0], store.image_size)
    for _, expected in workers.guarded_map(plainly, [args], 1):
        state, action, images = expected
        np.testing.assert_array_equal(store.state, state)
        np.testing.assert_array_equal(store.action, action)
        np.testing.assert_array_equal(store.images(np.arange(store.num_steps))[:, 0].numpy(), images)


def plainly(root: str, state_keys, action_keys, camera: str, size) -> tuple:
    import h5py
    from PIL import Image

    from common.data.frames import resize_rgb

    parts: list[list] = [[], [], []]
    for path in sorted(Path(root).rglob("*.hdf5"), key=lambda path: path.name):
        with h5py.File(path) as file:
            tops = [top for top in file.values() if isinstance(top, h5py.Group)]  # "data", or what it became
            groups = [top[name] for top in tops for name in sorted(top) if name.startswith("demo")]
            for group in groups or [file]:
                for part, keys in zip(parts, (state_keys, action_keys), strict=False):
                    part.append(
                        np.concatenate([group[key][()].reshape(len(group[key]), -1) for key in keys], 1)
                    )
                for cell in group[camera][()]:
                    if cell.dtype != np.uint8 or cell.ndim == 1:
                        cell = np.asarray(Image.open(io.BytesIO(bytes(cell))).convert("RGB"))
                    parts[2].append(resize_rgb(cell, size).transpose(2, 0, 1))
    state, action, images = np.concatenate(parts[0]), np.concatenate(parts[1]), np.stack(parts[2])
    return state.astype(np.float32), action.astype(np.float32), images


def check_lerobot(root: Path, store) -> None:
    import pyarrow.parquet as pq

    columns = ["observation.state", "action"]  # damage to others does not matter
    files = sorted((root / "data").rglob("*.parquet"))
    tables = [pq.read_table(file, columns=columns, partitioning=None) for file in files]
    for key, values in zip(columns, (store.state, store.action), strict=True):
        rows = np.concatenate([np.array(table[key].to_pylist(), np.float32) for table in tables])
        recorded = {tuple(row) for row in rows.tolist()}
        assert {tuple(row) for row in values.tolist()} <= recorded


def fuzz(folder: Path, seconds: float, first_seed: int = 0, examples: int | None = None) -> Fuzz:
    """Fuzz for this long, or for this many examples; if one raises, print it and raise."""
    target, end, number = Fuzz(folder), time.monotonic() + seconds, first_seed
    kinds = (
        st.tuples(st.just(target.bytes_of), example),
        st.tuples(st.just(target.contradictions), lerobot_mutations.example),
    )
    before, workers.STALL_SECONDS = workers.STALL_SECONDS, 4.0
    try:
        with workers.kept_pool():
            while time.monotonic() < end:

                @seed(number)
                @settings(
                    max_examples=examples or 200,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(st.one_of(*kinds))
                def run(kind_and_case):
                    if time.monotonic() < end:
                        kind, case = kind_and_case
                        kind(case)

                run()
                number += 1
                if examples:
                    break
    finally:
        workers.STALL_SECONDS = before
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        arranged = fuzz_layouts(Path(scratch), 6 * options.minutes, options.seed, 10**6)
        found = fuzz(Path(scratch), 54 * options.minutes, options.seed)
    for outcome, count in sorted(arranged.outcomes.items()):
        print(f"{count:7d}  arranged, {outcome}")
    for outcome, count in sorted(found.outcomes.items()):
        print(f"{count:7d}  {outcome}")
    print(f"{found.outcomes.total():7d}  in all; the slowest took {found.slowest:.1f} s")
