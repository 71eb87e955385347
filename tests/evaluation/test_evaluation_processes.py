"""Two processes give the numbers of one, to the last bit."""

import os
from pathlib import Path

import pytest
import torch
from test_predictor import Oracle, truncated

from uplvp_hf.data import load_dataset_rows
from uplvp_hf.data.synthetic import write_scenes
from uplvp_hf.evaluation import evaluate_model, load_segmenter, predict_dataset
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor

OPTIONS = {"batch_size": 1, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), count=7, seed=4, size=64)


def broken_rows(folder):
    """Seven images, of which the fourth cannot be decoded."""
    dataset = load_dataset_rows(folder)
    return truncated(dataset, 3, Path(folder))


class Seer(Oracle):
    """Knows the images by their pixels, in any order, and answers with annotations that are shifted more and more."""

    def __init__(self, dataset, processor):
        super().__init__(dataset)
        whole = [k for k in range(len(dataset)) if k != 3]
        self.places = {self.content(processor(dataset.load_image(k)).pixel_values[0]): k for k in whole}

    @staticmethod
    def content(pixels):
        return float(torch.as_tensor(pixels).double().sum())

    def forward(self, pixel_values, pixel_mask):
        self.position = self.places[self.content(pixel_values[0])]
        outputs = super().forward(pixel_values, pixel_mask)
        shift = self.position - 1  # has moved on
        outputs.masks_queries_logits = outputs.masks_queries_logits.roll(shift % 4, -1)
        return outputs


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    dataset = broken_rows(folder)
    processor = UplvpImageProcessor(size={"longest_edge": 64})
    model = Seer(dataset, processor)
    found, seen = {}, []
    for backend, metric in (("streaming", "coco"), ("pycocotools", "coco"), ("streaming", "cityscapes")):
        options = {**OPTIONS, "backend": backend, "metric": metric, "details": True, "distributed": True}
        if metric == "coco":
            options["on_result"] = lambda row, result: seen.append(row["image_id"])
        found[backend, metric] = numbers(evaluate_model(model, processor, dataset, **options))

    def fail(row, result):
        raise ValueError("enough")

    try:
        options = {"distributed": True, "on_result": fail if rank == 1 else None}
        evaluate_model(model, processor, dataset, **OPTIONS, **options)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    torch.save((found, seen), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No row has a `void`")
def test_two_processes_equal_one(folder):
    torch.multiprocessing.start_processes(one_of_two, (str(folder),), nprocs=2, start_method="forkserver")
    (first, seen), (second, others) = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.pop("error") == "RuntimeError: Process 1 failed: ValueError: enough"
    assert second.pop("error") == "ValueError: enough"
    dataset, processor = broken_rows(folder), UplvpImageProcessor(size={"longest_edge": 64})
    model = Seer(dataset, processor)
    for (backend, metric), found in first.items():
        options = {"backend": backend, "metric": metric, "details": True}
        expected = numbers(evaluate_model(model, processor, dataset, **OPTIONS, **options))
        assert found == second[backend, metric] == expected
        assert 0.1 < found["AP"] < 0.9
        assert found["num_images"] == 6 and [failure["row"] for failure in found["failures"]] == ["row 3"]
    ids = [row["image_id"] for row in dataset.rows]
    assert len(seen) > 0 < len(others)
    assert sorted(seen + others) == sorted(2 * [image_id for k, image_id in enumerate(ids) if k != 3])


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_are_the_rows_of_one_process(processes, folder, tiny_model_dir):
    """None twice, none missing, and the same batches."""
    dataset = load_dataset_rows(folder)
    model, processor = load_segmenter(str(tiny_model_dir), "cpu")
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    whole = list(predict_dataset(model, processor, dataset, batch_size=2, progress=False))
    expected, sizes[:] = sorted(sizes), []
    parts = []
    for rank in range(processes):
        share = (rank, processes)
        parts += predict_dataset(model, processor, dataset, batch_size=2, progress=False, share=share)
    hook.remove()
    assert sorted(sizes) == expected and len(parts) == len(whole) == 7
    by_id = {row["image_id"]: result for row, result in parts}
    for row, result in whole:
        assert by_id[row["image_id"]]["rle"] == result["rle"]
        assert torch.equal(by_id[row["image_id"]]["scores"], result["scores"])
