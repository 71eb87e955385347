"""Mask2Former against tensors recorded from mmdetection: same weights and images, every intermediate result."""

import pytest
import torch

from uplvp_hf.conversion import config_from_mmdet, convert_mmdet_mask2former
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation
from uplvp_hf.models.point_sampling import BinaryMasks

pytestmark = pytest.mark.golden


class RecordedDraw:
    """The recorded torch.rand calls: for each layer B matching draws, then one oversampled and one uniform draw."""

    per_layer = True

    def __init__(self, tensors, batch):
        self.tensors, self.batch, self.used = tensors, batch, set()

    def __call__(self, layer, kind, image, shape):
        place = {"match": image, "oversample": self.batch, "uniform": self.batch + 1}[kind]
        name = f"rand.{layer * (self.batch + 2) + place}"
        self.used.add(name)
        assert tuple(self.tensors[name].shape) == tuple(shape), (name, kind)
        return self.tensors[name]


@pytest.fixture(scope="module")
def run(golden):
    tensors, info = golden("mask2former")
    settings = config_from_mmdet(info["config"])
    config = UplvpConfig(
        segmenter_config={"model_type": "mask2former", **settings},
        id2label={i: f"class {i}" for i in range(settings.pop("num_labels"))},
    )
    model = UplvpForInstanceSegmentation(config).eval()  # batch norms of the recording are in eval mode
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    missing, unexpected = model.segmenter.load_state_dict(convert_mmdet_mask2former(state), strict=False)
    assert not unexpected
    assert {name for name in missing if not name.endswith("num_batches_tracked")} == {"criterion.empty_weight"}
    batch = len(info["img_metas"])
    labels = {
        "mask_labels": [tensors[f"input.gt_masks.{i}"].bool() for i in range(batch)],
        "class_labels": [tensors[f"input.gt_labels.{i}"] for i in range(batch)],
    }
    # mmdetection does not mask padding, hence no pixel_mask.
    features = model.segmenter.encode(tensors["input.img"])
    layers = model.segmenter.decode(features, model.segmenter.initial_queries(features))
    return {"tensors": tensors, "info": info, "model": model, "labels": labels, "features": features, "layers": layers}


def test_backbone_and_pixel_decoder(run, close):
    tensors, features = run["tensors"], run["features"]
    for index, map_ in enumerate(run["model"].segmenter.backbone(tensors["input.img"]).feature_maps):
        close(map_, tensors[f"backbone.{index}"])
    close(features.prompt_map, tensors["backbone.3"])
    close(features.mask_features, tensors["pixel_decoder.mask_features"])
    for index, level in enumerate(features.levels):
        close(level, tensors[f"pixel_decoder.multi_scale_memorys.{index}"])


def test_logits_of_all_layers(run, close):
    for index, layer in enumerate(run["layers"]):
        close(layer.class_logits, run["tensors"][f"layer{index}.cls_pred"])
        close(layer.mask_logits, run["tensors"][f"layer{index}.mask_pred"])
    assert f"layer{len(run['layers'])}.cls_pred" not in run["tensors"]


def test_matching_costs_and_assignments(run, close):
    tensors, labels, model = run["tensors"], run["labels"], run["model"]
    batch = len(labels["mask_labels"])
    masks = BinaryMasks(torch.cat(labels["mask_labels"]))
    costs = model.segmenter.loss_function._costs(
        run["layers"], masks, labels["class_labels"], None, RecordedDraw(tensors, batch)
    )
    _, matches = model.segmenter.loss(run["layers"], run["features"], **labels, draw=RecordedDraw(tensors, batch))
    for layer in range(len(run["layers"])):
        for i in range(batch):
            close(costs[i][layer], tensors[f"layer{layer}.assign_cost.{i}"])
            query, target = matches[layer][i]
            expected = zip(
                tensors[f"layer{layer}.assign_query.{i}"].tolist(),
                tensors[f"layer{layer}.assign_gt.{i}"].tolist(),
                strict=True,
            )
            assert set(zip(query.tolist(), target.tolist(), strict=True)) == set(expected)


def test_losses_and_gradients(run, close):
    tensors, info, model = run["tensors"], run["info"], run["model"]
    draw = RecordedDraw(tensors, len(info["img_metas"]))
    model.zero_grad()
    output = model(tensors["input.img"], **run["labels"], draw=draw)
    assert draw.used == {name for name in tensors if name.startswith("rand.")}
    last = len(run["layers"]) - 1
    names = {"class": "loss_cls", "mask": "loss_mask", "dice": "loss_dice"}
    assert len(output.losses) == len(names) * (last + 1)
    for ours, value in output.losses.items():
        kind, layer = ours.split("_")
        theirs = names[kind] if int(layer) == last else f"d{layer}.{names[kind]}"
        close(value, tensors[f"loss.{theirs}"], whole=output.loss.item())
    close(output.loss, tensors["loss_total"])

    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.segmenter.named_parameters()}
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    assert len(info["grad_norm"]) > 100
    places = _places(state)
    whole = max(info["grad_norm"].values())
    for name, norm in info["grad_norm"].items():
        total = torch.stack([gradients[n].double().square().sum() for n in places[name]]).sum().sqrt().item()
        close(total, norm, share=1e-4, message=name, whole=whole)
    covered = {ours for name in info["grad_norm"] for ours in places[name]}
    assert covered == {name for name, gradient in gradients.items() if gradient is not None}
    for name in (name.removeprefix("grad.") for name in tensors if name.startswith("grad.")):
        (ours,) = convert_mmdet_mask2former({name: state[name]})
        close(gradients[ours], tensors[f"grad.{name}"], share=1e-4, message=name, whole=whole)


def _places(state):
    """Recorded name -> our names (several for packed projections), found by marking every tensor with its number."""
    numbered = {name: torch.full_like(value, index) for index, (name, value) in enumerate(state.items())}
    names, places = list(state), {}
    for ours, value in convert_mmdet_mask2former(numbered).items():
        places.setdefault(names[int(value.flatten()[0])], []).append(ours)
    return places


def test_unknown_tensors_and_settings_are_refused(run):
    with pytest.raises(ValueError, match=r"backbone\.patch_embed"):
        convert_mmdet_mask2former({"backbone.patch_embed.projection.weight": torch.zeros(1)})
    config = run["info"]["config"]
    with pytest.raises(ValueError, match="ResNet"):
        config_from_mmdet({**config, "backbone": {"type": "SwinTransformer"}})
    train = {**config["train_cfg"], "assigner": {**config["train_cfg"]["assigner"], "dice_cost": {"weight": 1.0}}}
    with pytest.raises(ValueError, match="matching costs"):
        config_from_mmdet({**config, "train_cfg": train})
