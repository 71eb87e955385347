"""Final results on the recordings: those of the original pipelines."""

import math

import pytest
import torch
from test_uplvp_golden import KNETS, QUERYINSTS, Recording

from uplvp_hf.conversion.knet import config_from_mmdet_knet, convert_mmdet_knet
from uplvp_hf.conversion.queryinst import config_from_mmdet_queryinst, convert_mmdet_queryinst
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.image_processing_uplvp import UplvpImageProcessor
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation


@pytest.fixture(scope="module", params=KNETS + QUERYINSTS)
def run(golden, request):
    return Recording(golden, request.param)


def results(run, model, rows, threshold_name):
    """What the image processor makes of the images in `rows`, run as one batch."""
    rcnn, metas = run.info["config"]["test_cfg"]["rcnn"], [run.info["img_metas"][i] for i in rows]
    mask = None if run.pixel_mask is None else run.pixel_mask[rows]
    with torch.no_grad():
        output = model(run.pixels[rows], mask)
    return UplvpImageProcessor().post_process_instance_segmentation(
        output,
        threshold=0.0,
        mask_threshold=rcnn[threshold_name],
        target_sizes=[tuple(meta["ori_shape"][:2]) for meta in metas],
        input_sizes=[tuple(meta["img_shape"][:2]) for meta in metas],
        top_k=rcnn["max_per_img"],
        return_segmentation=False,
    )


def plain_model(run):
    """The prompting path is dropped for inference; the weights of the segmenter are the recorded ones."""
    model = UplvpForInstanceSegmentation(run.model.config)
    model.segmenter.load_state_dict(run.build().segmenter.state_dict())  # `run.model` has updated batch statistics
    return model.eval()


def test_final_results(run, close):
    """Scores, labels, boxes and masks in the pixels of the original image."""
    name = "result_labels.{}" if run.is_knet else "img{}.labels"
    if f"test.{name.format(0)}" not in run.tensors:
        pytest.skip("this recording has no inference")
    check_results(run, plain_model(run), close)


def check_results(run, model, close):
    tensors = run.tensors
    for i in range(run.batch):
        meta = run.info["img_metas"][i]
        edge = [math.ceil(2 * a / b) for a, b in zip(meta["ori_shape"][:2], meta["img_shape"][:2], strict=True)]
        if run.is_knet:
            boxes = tensors[f"test.result_bbox_score.{i}"]
            order = boxes[:, 4].argsort(descending=True, stable=True)
            by_score = [found[i] for found in [results(run, model, list(range(run.batch)), "mask_thr")]]
            masks = tensors[f"test.topk_masks.{i}"].bool()  # in order of score
            labels = tensors[f"test.topk_labels.{i}"]
        else:
            # Alone, as recorded, and in a batch, where the original mixes up the images.
            boxes = tensors[f"test.img{i}.bboxes_scores"]
            order = boxes[:, 4].argsort(descending=True, stable=True)
            by_score = [
                results(run, model, [i], "mask_thr_binary")[0],
                results(run, model, list(range(run.batch)), "mask_thr_binary")[i],
            ]
            masks, labels = tensors[f"test.img{i}.masks"].bool()[order], tensors[f"test.img{i}.labels"][order]
        boxes = boxes[order]
        present = masks.flatten(1).any(1)  # ours leaves out instances without a pixel
        for found in by_score:
            close(found["scores"], boxes[present, 4])
            assert torch.equal(found["labels"], labels[present])
            differ = found["masks"] != masks[present]
            same = ~differ.flatten(1).any(1)
            if run.is_knet:  # the original lets the padding into the last two pixels of the input
                differ = differ[:, : -edge[0], : -edge[1]]
            assert differ.sum() <= 1e-5 * differ.numel()
            assert (~differ.flatten(1).any(1)).sum() >= 0.8 * len(differ)
            close(found["boxes"][same], boxes[present][same][:, :4])


@pytest.mark.parametrize("name", ["knet_inst", "queryinst"])
def test_final_results_of_the_plain_segmenters(golden, name, close):
    run = Recording.__new__(Recording)
    run.tensors, run.info = golden(name)
    run.name, run.is_knet = name, name == "knet_inst"
    run.convert = convert_mmdet_knet if run.is_knet else convert_mmdet_queryinst
    run.pixels, run.batch = run.tensors["input.img"], len(run.info["img_metas"])
    run.pixel_mask = None if run.is_knet else run._pixel_mask()
    original = run.info["config"]
    if run.is_knet:
        segmenter = {"model_type": "knet", **config_from_mmdet_knet(original)}
    else:
        segmenter = {"model_type": "queryinst", **config_from_mmdet_queryinst(original), "mask_padding": False}
    classes = segmenter.pop("num_labels")
    config = UplvpConfig(segmenter_config=segmenter, id2label={i: f"class{i}" for i in range(classes)})
    model = UplvpForInstanceSegmentation(config).eval()
    missing, unexpected = model.segmenter.load_state_dict(run.convert(run.state()), strict=False)
    assert not unexpected and all(entry.endswith("num_batches_tracked") for entry in missing)
    check_results(run, model, close)
