import numpy as np
import pytest
from PIL import Image

from common.plots import draw_chunks


@pytest.mark.parametrize("dims", [1, 4, 30])
def test_chunks_are_drawn_for_any_number_of_dimensions(dims, tmp_path):
    chunks, recorded = np.random.default_rng(0).normal(size=(5, 8, dims)), np.zeros((6, dims))
    shares = {"prior": np.array([0.9, 0.1, 0, 0, 0]), "usage": np.full(5, 0.2)}
    names = [f"joint {d}" for d in range(dims)]
    draw_chunks(tmp_path / "a.png", chunks, recorded, names, np.ones(dims), shares, "five codes")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").resize((200, 100)).getcolors(20_000)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
