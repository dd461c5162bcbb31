"""Fast rendering of MuJoCo scenes on computers without a graphics card."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import numpy as np

from common.envs import NO_DISPLAY
from common.errors import UserError

_open: weakref.WeakSet = weakref.WeakSet()


def _close() -> None:
    """Close renderers that are still open when the program ends."""
    for renderer in list(_open):
        renderer.close()


class Renderer:
    """Renders a scene without what costs most and helps least: shadows, reflections, antialiasing.

    By default, Meta-World has shadow maps of 4096 pixels and four samples per pixel: a 128x128 picture takes
    112 ms in software, and about 10 ms without them.

    Args:
        model, data: MuJoCo's `MjModel` and `MjData`.
        size: (H, W).
    """

    def __init__(self, model: Any, data: Any, size: tuple[int, int]):
        import mujoco

        self.data = data
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.mat_reflectance[:] = 0
        model.vis.global_.offheight = max(model.vis.global_.offheight, size[0])
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size[1])
        try:
            self.renderer = mujoco.Renderer(model, *size)
        except Exception as error:  # whatever the platform's library raises
            raise UserError(
                f"MuJoCo cannot render here ({' '.join(str(error).split())[:200]}): {NO_DISPLAY}."
            ) from error
        if not _open:  # registered after MuJoCo closes the display itself, so called before that
            atexit.register(_close)
        _open.add(self.renderer)

    def __call__(self, camera: str) -> np.ndarray:
        """What a camera sees now, (H, W, 3) uint8."""
        self.renderer.update_scene(self.data, camera=camera)
        return self.renderer.render()
