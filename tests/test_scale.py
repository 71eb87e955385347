"""docs/scale.md and docs/scale/: every configuration is read by the program that it is for."""

import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from uplvp_hf.cli import SHARED
from uplvp_hf.commands import finetune, label, pretrain, training
from uplvp_hf.labeling.catalog import labeler_entry
from uplvp_hf.labeling.part import Part
from uplvp_hf.training.config import load_settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "scale"
TEXT = (ROOT / "docs" / "scale.md").read_text()
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
# What the shell would put in.
VALUES = {"$PHOTOS": "photos", '"$PARTS"/*': "parts/1 parts/2", "$PARTS": "parts", "$SLURM_ARRAY_TASK_ID": "3",
          "$SHARDS": "16", "$((SLURM_NNODES * GPUS))": "16", "$SLURM_NNODES": "2", "$SLURM_NODEID": "1",
          "$MAIN": "node1"}  # fmt: skip


def commands(text):
    """The words of every command in which the library takes part, of shell code."""
    for name, value in VALUES.items():
        text = text.replace(name, value)
    lines = text.replace("\\\n", " ").splitlines()
    lines = [line.strip().removesuffix("&&") for line in lines if not line.lstrip().startswith("#")]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(("uplvp ", "accelerate "))]
    return found


def in_guide():
    return [words for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S) for words in commands(block)]


def parsed(words, monkeypatch):
    """Runs the parser of the verb, and reads the settings; what is left of `accelerate launch` goes to Accelerate's."""
    if words[0] == "accelerate":
        args = launch_command_parser().parse_args(words[2:])
        assert (ROOT / args.config_file).is_file() and (ROOT / args.training_script).is_file()
        words = ["uplvp", Path(args.training_script).stem, *args.training_script_args]
    verb, rest = words[1], words[2:]
    if "--processes" in rest:
        assert verb in SHARED
        place = rest.index("--processes")
        rest = rest[:place] + rest[place + 2 :]
    if verb == "label":
        args = label.parse(rest)
        if args.shard is not None:
            Part.parse(args.shard)
        if args.output is not None and args.merge is None:
            args.labeler = args.labeler or "clip"
            args.namer = args.namer or labeler_entry(args.labeler).namer
            label.read_settings(args)
        return verb, args
    found = []
    monkeypatch.setattr(training, "run", lambda command, work, *others: work())
    monkeypatch.setattr(training, "_train", lambda stage, args: found.append(args))
    {"pretrain": pretrain, "finetune": finetune}[verb].main(rest)
    load_settings(found[0].recipe, [*found[0].settings, f"stage={verb}"])
    return verb, found[0]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_reads_its_files(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == {"one_gpu": 1, "eight_gpus": 8, "two_machines": 16}[file.stem]
    assert config.num_machines == (2 if file.stem == "two_machines" else 1)
    several = config.num_processes > 1
    assert config.distributed_type == (DistributedType.MULTI_GPU if several else DistributedType.NO)
    assert not config.fsdp_config and not config.deepspeed_config  # which the loop refuses
    assert file.name in TEXT


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_bash_and_the_verbs_read_the_slurm_scripts(file, monkeypatch):
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert file.read_text().startswith("#!/bin/bash\n") and file.name in TEXT
    found = commands(file.read_text())
    assert found
    for words in found:
        parsed(words, monkeypatch)


def test_the_array_has_as_many_tasks_as_parts():
    text = (FOLDER / "label_array.sbatch").read_text()
    assert re.search(r"--array=1-(\d+)", text)[1] == re.search(r"^SHARDS=(\d+)", text, re.M)[1]


def test_the_commands_of_the_guide_parse(monkeypatch):
    verbs = [parsed(words, monkeypatch)[0] for words in in_guide()]
    assert verbs.count("label") >= 3 and verbs.count("pretrain") >= 4


def test_the_options_of_hf_jobs_exist():
    jobs = pytest.importorskip("huggingface_hub.cli.jobs")
    lines = [line for line in TEXT.replace("\\\n", " ").splitlines() if line.startswith("hf jobs ")]
    assert len(lines) == 2
    for line in lines:
        verb = jobs.jobs_uv_run if line.startswith("hf jobs uv run") else jobs.jobs_run
        known = {f"--{name.strip('_').replace('_', '-')}" for name in inspect.signature(verb).parameters}
        own = re.split(r" (?:\S*pytorch/|scripts/)", line)[0]
        used = set(re.findall(r"--[a-z-]+", own))
        assert used and used <= known, used - known
        flavor = re.search(r"--flavor (\S+)", line)[1]
        assert flavor in {hardware.value for hardware in jobs.JobHardware}


def test_the_script_that_printed_the_costs_exists(load_script):
    name = re.search(r"scripts/(benchmark_label_cost)\.py", TEXT)[1]
    module = load_script(name)
    run = {"seconds": 0.36, "bytes": 1000.0, "masks": 2.0}
    *_, line = module.extrapolated({"x": run})
    assert line == "| x | 0.360 | 1,000 | 10.0 h | 0.2 h | 100.0 h | 1.6 h | 1.0 GB |"
    rows = [row for row in TEXT.splitlines() if row.startswith("|") and row.endswith(" h |")]
    assert len(rows) >= 3
    for row in rows:  # what goes on to more images is the measured number, multiplied
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for cell, count in zip(cells[2:6], (1e5, 1e5 / 64, 1e6, 1e6 / 64), strict=True):
            assert float(cell.removesuffix(" h")) == pytest.approx(float(cells[1]) * count / 3600, abs=0.051)
