"""What a reader of one train step pays: the package's own files that it enters, and the depth of its calls."""

import os
import sys
from types import FrameType

import jax

import t5x_like
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.job import set_up
from tests import toy

MAX_FILES, MAX_FRAMES = 37, 21
"""Of one step of a decoder; frames of JAX and Flax are not counted. To be lowered, not raised."""

ROOT = os.path.dirname(t5x_like.__file__) + os.sep


def place(frame: FrameType) -> str:
    """`file:function` of a frame of ours, else nothing."""
    file = frame.f_code.co_filename
    return f"{file.removeprefix(ROOT)}:{frame.f_code.co_name}" if file.startswith(ROOT) else ""


def own_stack(frame: FrameType | None) -> list[str]:
    """Our frames from `train_step` inwards; none outside of it."""
    stack = []
    while frame is not None:
        if where := place(frame):
            stack.append(where)
            if frame.f_code.co_name == "train_step":
                return stack[::-1]
        frame = frame.f_back
    return []


def test_a_train_step_stays_within_its_budget(tmp_path):
    toy.write_text(tmp_path, num_words=200)
    experiment = toy.experiment(tmp_path)
    job = set_up(experiment, build_mesh(experiment.mesh), toy.VOCAB)
    files: set[str] = set()
    deepest: list[str] = []

    def note(frame, event, _):
        nonlocal deepest
        if event == "call" and place(frame) and (stack := own_stack(frame)):
            files.add(place(frame).partition(":")[0])
            deepest = max(deepest, stack, key=len)

    jax.clear_caches()  # What was traced before is not entered again.
    before = sys.getprofile()
    with job.placement.use():
        sys.setprofile(note)
        try:
            jax.jit(job.train_step).trace(job.state, job.batch)
        finally:
            sys.setprofile(before)
    listed, stack = "\n  ".join(sorted(files)), "\n  ".join(deepest)
    print(f"{len(files)} own files:\n  {listed}\n{len(deepest)} own frames:\n  {stack}")
    assert len(files) <= MAX_FILES, f"A train step enters {len(files)} own files, at most {MAX_FILES}:\n  {listed}"
    assert len(deepest) <= MAX_FRAMES, f"It is {len(deepest)} own frames deep, at most {MAX_FRAMES}:\n  {stack}"
