"""Settings: recipes, overrides, errors that say what was meant; optimizer groups, schedule, order of samples."""

import itertools

import pytest
import torch
import transformers
import yaml

from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.modeling_uplvp import UplvpForPreTraining
from uplvp_hf.training.config import ConfigError, OptimSettings, TrainSettings, load_settings
from uplvp_hf.training.optim import learning_rate_factor, make_optimizer, parameter_groups, with_steps
from uplvp_hf.training.recipes_file import shipped_recipes
from uplvp_hf.training.stream import SampleKeys


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_recipe_over_defaults_and_words_over_both(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        {"output": "from/recipe", "optim": {"lr": "1e-3", "steps": 7}, "model": {"segmenter": {"num_queries": 9}}},
    )
    words = ["optim.lr=2e-3", "--model.segmenter.num_queries=11", "data.scale_range=[1, 2]", "data.val="]
    settings = load_settings(
        recipe, words, output="default", seed=4, optim={"steps": 1, "clip": 2}, data={"val": "somewhere"}
    )
    assert settings.output == "from/recipe" and settings.seed == 4 and settings.data.val is None
    assert settings.optim.lr == 0.002 and settings.optim.steps == 7 and settings.optim.clip == 2.0
    assert isinstance(settings.optim.clip, float) and settings.data.scale_range == [1.0, 2.0]
    assert settings.model.segmenter == {"num_queries": 11}
    assert settings.optim.batch_size == OptimSettings().batch_size
    again = load_settings(write(tmp_path / "again.yaml", settings.to_dict()))
    assert again == settings
    assert load_settings() == TrainSettings()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], r"Unknown setting `optim.lrr`. Did you mean `optim.lr`\?"),
        (["lr=1"], r"Unknown setting `lr`. Did you mean `optim.lr`\?"),
        (["model.labels_per_class=3"], r"Did you mean `data.labels_per_class`\?"),
        (["dataa.size=64"], r"Unknown setting `dataa`. Did you mean `data`\?"),
        (["checkpoint.zzz=1"], "Known here: checkpoint.every, checkpoint.keep"),
        (["{1: 2}=3"], "Unknown setting"),
        (["optim.steps"], "not of the form section.key=value"),
        (["optim=3"], "`optim` is a section"),
        (["optim=3", "optim.lr=1"], "`optim` is a value, not a section"),
        (["optim.lr=[1"], r"`optim.lr` must be a number, got '\[1'"),
        (["optim.steps=2.5"], "`optim.steps` must be a whole number, got 2.5"),
        (["optim.steps=true"], "`optim.steps` must be a whole number"),
        (["optim.lr=true"], "`optim.lr` must be a number"),
        (["optim.lr=nan"], "`optim.lr` must be a number"),
        (["optim.lr=fast"], "`optim.lr` must be a number, got 'fast'"),
        (["optim.lr="], "`optim.lr` needs a value"),
        (["data.flip=[1]"], "`data.flip` must be a number"),
        (["data.scale_range=[1, a]"], r"`data.scale_range\[1\]` must be a number"),
        (["model.freeze_backbone=1"], "`model.freeze_backbone` must be true or false"),
        (["stage=train"], "`stage` must be one of pretrain, finetune, fewshot, got `train`"),
        (["mixed_precision=int8"], "`mixed_precision` must be one of"),
        (["optim.schedule=exponential"], "`optim.schedule` must be one of"),
        (["optim.optimizer=adam"], "`optim.optimizer` must be one of adamw, sgd, got `adam`. Did you mean `adamw`"),
        (["optim.momentum=1"], "`optim.momentum` must be at least 0 and below 1, got 1.0"),
        (["model.class_head=drop"], "`model.class_head` must be one of"),
        (["optim.steps=0"], "`optim.steps` must be at least 1, got 0"),
        (["log_every=0"], "`log_every` must be at least 1"),
        (["optim.clip=-1"], "`optim.clip` must be at least 0"),
        (["data.size=100"], "`data.size` must be a multiple of 32 pixels, got 100"),
    ],
)
def test_wrong_words_are_explained(words, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(None, words)


def test_wrong_recipes_are_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"No recipe file `nothing`. Shipped recipes: .*small_finetune"):
        load_settings("nothing")
    with pytest.raises(ConfigError, match=r"bad.yaml is not valid YAML"):
        load_settings(write(tmp_path / "bad.yaml", "optim: [1"))
    with pytest.raises(ConfigError, match=r"list.yaml must hold settings"):
        load_settings(write(tmp_path / "list.yaml", "[1, 2]"))
    with pytest.raises(ConfigError, match="`optim` is a section"):
        load_settings(write(tmp_path / "empty.yaml", "optim:\n"))
    with pytest.raises(ConfigError, match="`output` must be text"):
        load_settings(write(tmp_path / "map.yaml", {"output": {"a": 1}}), output="runs")
    with pytest.raises(ConfigError, match="Unknown setting `1`"):
        load_settings(write(tmp_path / "key.yaml", "1: 2"))


def test_shipped_recipes_are_valid():
    names = shipped_recipes()
    assert {"small_finetune", "scenes_pretrain"} <= set(names)
    for name in names:
        settings = load_settings(name)
        assert settings.stage in name or name == "scenes_icpc"
        if settings.model.segmenter is None:  # the segmenter of what it starts from
            assert settings.model.init is not None
        elif settings.model.segmenter.get("model_type") == "icpc":  # of networks that are loaded only as it is built
            assert {"clip", "model_type"} <= set(settings.model.segmenter)
        else:
            UplvpConfig(segmenter_config=settings.model.segmenter)


def factors(steps=100, warmup=0, **settings):
    optim = OptimSettings(steps=steps, warmup=warmup, **settings)
    return [learning_rate_factor(step, optim) for step in range(steps)]


def rates_of(make_scheduler, steps):
    """What a scheduler of another library sets a rate of 1 to, at every step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_are_those_of_torch_and_transformers():
    schedulers = torch.optim.lr_scheduler
    poly = rates_of(lambda o: schedulers.PolynomialLR(o, total_iters=60, power=0.9), 60)
    assert factors(60, schedule="poly") == pytest.approx(poly)
    assert factors(60, schedule="poly", power=2.0) != pytest.approx(poly)
    stepped = rates_of(lambda o: schedulers.MultiStepLR(o, [201, 276], gamma=0.1), 300)
    assert factors(300, schedule="step", milestones=[0.67, 0.92]) == pytest.approx(stepped)
    warm = {"warmup": 7, "warmup_factor": 0.0}
    for schedule, theirs in {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }.items():
        assert factors(50, schedule=schedule, **warm) == pytest.approx(rates_of(lambda o: theirs(o, 7, 50), 50))  # noqa: B023
    poly = rates_of(
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 7, 50, lr_end=0.0, power=0.9), 50
    )
    assert factors(50, schedule="poly", **warm) == pytest.approx(poly)
    constant = rates_of(lambda o: transformers.get_constant_schedule_with_warmup(o, 7), 50)
    assert factors(50, schedule="constant", **warm) == pytest.approx(constant)
    # mmcv's linear warm-up from a ratio, then steps: the released recipes.
    ratio = rates_of(lambda o: schedulers.LinearLR(o, start_factor=0.001, total_iters=20), 40)
    assert factors(40, warmup=20, warmup_factor=0.001) == pytest.approx(ratio)


def test_warmup_without_a_factor_never_is_zero_nor_whole():
    for schedule in ("constant", "linear", "cosine", "poly", "step"):
        rates = factors(warmup=9, schedule=schedule)
        assert rates[:9] == pytest.approx([(k + 1) / 10 for k in range(9)]) and rates[9] == 1
        assert all(a >= b > 0 for a, b in itertools.pairwise(rates[9:]))


def test_epochs_become_whole_steps():
    def steps(images, processes, *words):
        return with_steps(load_settings(None, list(words)), images, processes).optim.steps

    batch = ["optim.batch_size=4", "optim.accumulation=2"]
    assert steps(100, 1, *batch, "optim.steps=7") == 7
    assert steps(96, 1, *batch, "optim.epochs=2") == 24
    assert steps(97, 1, *batch, "optim.epochs=2") == 25
    assert steps(96, 2, *batch, "optim.epochs=2") == 12
    assert steps(96, 1, *batch, "optim.epochs=0.5") == 6
    assert steps(3, 1, *batch, "optim.epochs=0.1") == 1
    assert steps(300, 1, "optim.batch_size=3", "optim.epochs=0.7") == 70  # 0.7 * 300 is a bit above 210


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_parameter_groups(tiny_segmenter, backbone):
    model = UplvpForPreTraining(UplvpConfig(segmenter_config=tiny_segmenter(backbone), id2label={0: "a"}))
    model.segmenter.class_predictor.requires_grad_(False)
    groups = parameter_groups(model, OptimSettings(lr=1.0, backbone_multiplier=0.25, weight_decay=0.5))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    expected = {}
    for name, parameter in model.named_parameters():
        if "class_predictor" in name:
            continue
        rate = 0.25 if "pixel_level_module.encoder." in name else 1.0
        tables = ("level_embed", "level_embed.weight", "position_embeddings", "relative_position_bias_table")
        embedding = "queries_" in name or name.endswith(tables)
        expected[id(parameter)] = (rate, 0.0 if parameter.dim() == 1 or embedding else 0.5)
    assert found == expected
    sgd = make_optimizer(model, OptimSettings(optimizer="sgd", momentum=0.8, lr=1.0, backbone_multiplier=0.25))
    assert type(sgd) is torch.optim.SGD and {group["momentum"] for group in sgd.param_groups} == {0.8}
    assert {group["base_lr"] for group in sgd.param_groups} == {0.25, 1.0}
    assert type(make_optimizer(model, OptimSettings())) is torch.optim.AdamW
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        make_optimizer(model, OptimSettings())


def test_every_epoch_shows_every_image_once_whatever_the_processes():
    optim = {"steps": 15, "batch_size": 2, "accumulation": 2}
    settings = load_settings(None, [], seed=3, optim=optim)
    one = [key for batch in SampleKeys(10, settings, 0) for key in batch]
    assert len(one) == 60 and len(SampleKeys(10, settings, 0)) == 30
    epochs = [[index for epoch, index in one if epoch == e] for e in range(6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert [key for batch in SampleKeys(10, settings, 9) for key in batch] == one[36:]
    other = load_settings(None, [], seed=4, optim=optim)
    assert [key for batch in SampleKeys(10, other, 0) for key in batch] != one
    # Two processes of batch 1 see, at every micro-batch, what one process of batch 2 sees.
    halved = load_settings(None, ["optim.batch_size=1"], seed=3, optim=optim)
    ranks = [list(SampleKeys(10, halved, 0, rank, 2)) for rank in range(2)]
    assert [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch] == one
    state = torch.get_rng_state()
    list(SampleKeys(10, settings, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_words_that_yaml_would_read_as_something_else_stay_text():
    """YAML takes off, no and 12 for a truth value and a number; a folder may be called so."""
    settings = load_settings(None, ["model.init=off", "data.train=12", "output=no", "model.segmenter.flag=off"])
    assert (settings.model.init, settings.data.train, settings.output) == ("off", "12", "no")
    assert settings.model.segmenter == {"flag": False}
    assert load_settings(None, ["data.val=null"]).data.val is None
