"""frames.py: a run's last episode on MuJoCo or Meta-World, as a strip of rendered frames.

in : a finished run          out: a figure; None for a family without a simulator
Read beside page.py. Nothing of the paper is here.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from pictures.curves import pyplot
from pictures.routers import play_episodes
from pictures.runs import LeftOut, Run

CAMERAS = {"cheetah-vel": "track", "cheetah-vel-3cluster": "track", "walker-param": "track"}
CAMERAS |= {"reach": "corner3", "push": "corner3"}


def draw_frames(run: Run, episodes: int, renderer: Any = None, frames: int = 6):
    """The last of so many episodes on the first held-out task. Raises LeftOut without OpenGL."""
    env = run.method.cfg.data.env
    if env not in CAMERAS:
        return None
    task = run.split.test[0]
    batch = run.method.family.batch([task], 0)
    single = getattr(batch, "simulator", None)  # manipulation.py's; locomotion.py has none
    model, data = (single.model, single.data) if single else (batch.models[0], batch.datas[0])
    try:  # before the episodes, which take a while
        view = (renderer or off_screen())(model)
    except Exception as error:  # whatever the libraries of a machine raise
        said = " ".join(str(error).split())[:100]
        raise LeftOut(f"none: OpenGL cannot draw off screen here ({said})") from error
    import mujoco  # not at the top: no simulator loads where none is drawn

    last = play_episodes(run.method, [task], episodes)[-1]
    shown = [i * (last.steps - 1) // (frames - 1) for i in range(frames)]
    figure, axes = pyplot().subplots(1, frames, figsize=(2.2 * frames, 2.2), layout="constrained")
    with view:
        for step in range(last.steps):
            if single is None:  # a state has all places but x, and the camera goes along
                data.qpos[1:] = last.states[0, step, : model.nq - 1]
                mujoco.mj_forward(model, data)
            if step in shown:
                view.update_scene(data, CAMERAS[env])
                axis = axes[shown.index(step)]
                axis.imshow(view.render())
                axis.set(title=f"step {step + 1}", xticks=[], yticks=[])
            if single is not None:  # a state has the hand alone; nothing is random: play it again
                single.step(last.actions[0, step].numpy())
    figure.suptitle(f"episode {episodes}: return {last.rewards.sum():.1f}", fontsize=10)
    return figure


def off_screen() -> type:
    """MuJoCo's renderer, on Linux with EGL: its own choice there, GLFW, needs a screen."""
    import mujoco

    if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        from mujoco import egl, gl_context

        gl_context.GLContext = egl.GLContext

    class Renderer(mujoco.Renderer):
        _gl_context = _mjr_context = None  # `close` asks for them, also where it has not begun

    return Renderer
