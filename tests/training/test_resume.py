"""A run that is stopped anywhere, by SIGKILL too, and resumed ends with the bytes of the uninterrupted run."""

import json
import random
import shutil
import signal
import textwrap

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import PROCESS, assert_same_run, log_of, stop_at

from uplvp_hf.files import only_run
from uplvp_hf.models.errors import UserError
from uplvp_hf.training.checkpoint import list_checkpoints, new_folder, newest_checkpoint
from uplvp_hf.training.config import ConfigError
from uplvp_hf.training.random_state import random_state, restore_random_state

# Every kind of state at once: worker processes, accumulation, moving average, evaluation, best model.
FULL = ["log_every=1", "data.workers=2", "optim.accumulation=2", "optim.batch_size=1", "optim.ema=0.9"]
FULL += ["evaluation.every=3", "checkpoint.best=true"]

# Where the process kills itself: {name: code}. Two micro-batches a step; checkpoints after steps 2 and 4.
POINTS = {
    "before an update": """
        def clip(self):  # gradients of the third step are there
            calls.append(None)
            return die() if len(calls) == 3 else inner(self)
        calls, inner = [], loop._Run._clip
        loop._Run._clip = clip
    """,
    "between weights and average": """
        def update(self):
            return die() if self.updates == 4 else inner(self)
        inner = ema.WeightAverage.update
        ema.WeightAverage.update = update
    """,
    "in the middle of a file": """
        def save(tensors, path):
            inner(tensors, path)
            if path.parent.name == ".checkpoint-4.tmp" and path.name == "optimizer.safetensors":
                os.truncate(path, path.stat().st_size // 2)
                die()
        inner = checkpoint.save_file
        checkpoint.save_file = save
    """,
    "before a checkpoint has its name": """
        def replace(source, target):
            return die() if str(target).endswith("checkpoint-4") else inner(source, target)
        inner = os.replace
        checkpoint.os.replace = replace
    """,
    "after a checkpoint has its name": """
        def replace(source, target):
            inner(source, target)
            if str(target).endswith("checkpoint-4"):
                die()
        inner = os.replace
        checkpoint.os.replace = replace
    """,
    "while a best model is written": """
        def write(path, content):
            inner(path, content)
            if path.name == "best.json":
                die()
        inner = validation.write_json
        validation.write_json = write
    """,
}
# One process that has imported everything forks the runs that are to die. Written at the end: the exit status of each.
FORKS = """
import json, time
from pathlib import Path
from uplvp_hf.training import ema, validation

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(folder, prepare="", kill_at=None):
    child, resume = os.fork(), os.path.isdir(folder)
    if child == 0:
        exec(prepare, globals())
        loop.train(load_settings(recipe, [*words, f"output={folder}"]), resume=resume, progress=False)
        os._exit(0)
    log, done = Path(folder, "log.jsonl"), 0
    while kill_at and not done:
        if log.is_file() and f'"step": {kill_at},' in log.read_text():
            os.kill(child, signal.SIGKILL)
            break
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    return status if done else os.waitpid(child, 0)[1]

points = json.loads(Path(output, "points.json").read_text())
ends = {name: run(f"{output}/{name}", prepare) for name, prepare in points.items()}
ends |= {f"outside at {step}": run(f"{output}/outside", kill_at=step) for step in (3, 5)}
Path(output, "ends.json").write_text(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def shared():
    """What is made once for several tests: the uninterrupted run, the runs that died."""
    return {}


@pytest.fixture
def whole(shared, run, scenes_dir, tmp_path, tmp_path_factory):
    """Folder of the uninterrupted run."""
    if "whole" not in shared:
        run("whole", *FULL, f"data.val={scenes_dir}")
        shared["whole"] = shutil.copytree(tmp_path / "whole", tmp_path_factory.mktemp("full") / "whole")
    return shared["whole"]


@pytest.fixture
def killed(shared, recipe, scenes_dir, tmp_path, tmp_path_factory):
    """Folder of the runs that were killed at the points, by name, and the exit status of each."""
    if "killed" not in shared:
        folder, script = tmp_path_factory.mktemp("killed"), tmp_path / "killed.py"
        script.write_text(PROCESS + FORKS)
        (folder / "points.json").write_text(json.dumps({name: textwrap.dedent(code) for name, code in POINTS.items()}))
        alone = {"CUDA_VISIBLE_DEVICES": ""}
        done = processes.run(script, recipe, folder, *FULL, f"data.val={scenes_dir}", environment=alone)
        assert done.returncode == 0, done.stderr[-3000:]
        shared["killed"] = folder, json.loads((folder / "ends.json").read_text())
    return shared["killed"]


@pytest.mark.slow
@pytest.mark.parametrize("point", list(POINTS))
def test_killed_at_a_point(run, tmp_path, scenes_dir, whole, killed, point):
    folder, ends = killed
    assert ends[point] == signal.SIGKILL
    parts = shutil.copytree(folder / point, tmp_path / "parts")
    assert not (parts / "model.safetensors").exists()
    run("parts", *FULL, f"data.val={scenes_dir}", resume=True)
    assert_same_run(whole, parts)
    assert not list(parts.glob(".*tmp"))
    average = load_file(parts / "checkpoint-4" / "average.safetensors")
    assert len(average) > 150 and all(value.dtype == torch.float32 for value in average.values())


@pytest.mark.slow
def test_killed_from_outside_and_killed_again(run, tmp_path, scenes_dir, whole, killed):
    """By another process, whenever it comes, first soon after the third step and then after the fifth."""
    folder, ends = killed
    assert ends["outside at 3"] == ends["outside at 5"] == signal.SIGKILL
    parts = shutil.copytree(folder / "outside", tmp_path / "parts")
    run("parts", *FULL, f"data.val={scenes_dir}", resume=True)
    assert_same_run(whole, parts)


def cut_model(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


TORN = {
    "no state": lambda checkpoint: (checkpoint / "state.json").unlink(),
    "half a state": lambda checkpoint: (checkpoint / "state.json").write_text('{"step": 4, "fil'),
    "a cut file": cut_model,
    "a missing file": lambda checkpoint: (checkpoint / "optimizer.safetensors").unlink(),
}


@pytest.mark.parametrize("fault", list(TORN))
def test_torn_checkpoints_are_never_chosen(run, tmp_path, monkeypatch, caplog, fault):
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    parts = tmp_path / "parts"
    assert [path.name for path in list_checkpoints(parts)] == ["checkpoint-2", "checkpoint-4"]
    TORN[fault](parts / "checkpoint-4")
    assert newest_checkpoint(parts) == parts / "checkpoint-2" == list_checkpoints(parts)[-1]
    assert "checkpoint-4 is not complete and left aside" in caplog.text
    caplog.clear()
    result = run("parts", resume=True)
    assert "checkpoint-4 is not complete" in caplog.text and result.steps == 6
    assert [path.name for path in list_checkpoints(parts)] == ["checkpoint-2", "checkpoint-4"]  # made again


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a") as draft:
        (draft / "file").write_text("1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(KeyError), new_folder(tmp_path / "a") as draft:
        (draft / "file").write_text("2")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "file").read_text() == "1"
    with new_folder(tmp_path / "a") as draft:
        (draft / "other").write_text("3")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]


def test_every_random_generator_is_restored():
    def draws():
        return torch.rand(2).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    device = torch.device("cpu")
    for odd in (0, 1):  # normal numbers come in pairs: the second one is state too
        np.random.standard_normal(odd)
        [random.gauss(0, 1) for _ in range(odd)]
        state = random_state(device)
        first = draws()
        assert draws() != first
        restore_random_state(state, device)
        assert draws() == first


@pytest.mark.slow
def test_settings_that_change_nothing_may_change(run, tmp_path, scenes_dir, monkeypatch):
    """Neither when it is evaluated or logged, nor how the same images are cut into batches."""
    run("whole", "log_every=1")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts", "log_every=1")
    free = ["checkpoint.every=4", "checkpoint.keep=3", f"data.val={scenes_dir}", "evaluation.every=5", "tracker="]
    run("parts", "log_every=2", "optim.max_skipped=3", "data.workers=1", *free, resume=True)
    one, other = tmp_path / "whole", tmp_path / "parts"
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert [line["step"] for line in log_of(other)] == [1, 2, 4, 5, 6, 6]
    assert json.loads((other / "settings.json").read_text())["log_every"] == 2


def test_settings_that_change_updates_may_not_change(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts", "optim.schedule=cosine")
    for words, message in {
        ("optim.ema=0.9",): "optim.ema was 0.0, now 0.9",
        ("data.flip=0",): "data.flip was 0.5, now 0.0",
        ("optim.steps=8",): r"optim.steps was 6, now 8.*only with optim.schedule=constant",
        ("optim.epochs=9",): "optim.epochs was None, now 9.0",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run("parts", "optim.schedule=cosine", *words, resume=True)
    with pytest.raises(ConfigError, match=r"started with 2 images a step.*now they are 6"):
        run("parts", "optim.schedule=cosine", "optim.batch_size=3", "optim.accumulation=2", resume=True)
    assert run("parts", "optim.schedule=cosine", "optim.batch_size=1", "optim.accumulation=2", resume=True).steps == 6


def test_a_second_run_into_one_output_is_refused(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    with only_run(tmp_path / "parts"):  # as the first of two that go on with it
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*")}
        with pytest.raises(UserError, match=r"another run is writing into .*parts"):
            run("parts", resume=True)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*")}
    assert run("parts", resume=True).steps == 6


@pytest.mark.slow
def test_a_run_at_a_constant_rate_can_be_made_longer(run, tmp_path, scenes_dir):
    run("long", "optim.steps=8", "log_every=2")
    run("short", "log_every=2")
    run("short", "log_every=2", "optim.steps=8", resume=True)
    assert_same_run(tmp_path / "long", tmp_path / "short")
    with pytest.raises(ConfigError, match=r"checkpoint-6 is beyond optim\.steps=5"):
        run("short", "log_every=2", "optim.steps=5", resume=True)
    ended = run("short", "log_every=2", "optim.steps=6", f"data.val={scenes_dir}", resume=True)
    assert list(ended.evaluations) == [6] and ended.steps == 6  # evaluated though nothing was left to train


def test_other_images_are_refused(run, scenes_dir, tmp_path, monkeypatch):
    """The order of the images depends on how many there are."""
    shutil.copytree(scenes_dir, tmp_path / "data")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts", f"data.train={tmp_path / 'data'}")
    file = tmp_path / "data" / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    gone = content["images"].pop()["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != gone]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"with 6 training images, now there are 5.*Restore the data"):
        run("parts", f"data.train={tmp_path / 'data'}", resume=True)


def test_records_of_older_versions_are_filled_with_defaults(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    file = tmp_path / "parts" / "settings.json"
    record = json.loads(file.read_text())
    del record["fsdp"], record["optim"]["power"], record["checkpoint"]
    file.write_text(json.dumps(record))
    assert run("parts", resume=True).steps == 6
