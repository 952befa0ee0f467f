"""What `python -m wsolnb.train` trains is what the notebooks then find."""

from wsolnb.notebook import runs
from wsolnb.notebook.params import notebook_parameters
from wsolnb.papers import locloc, lpcam, scm
from wsolnb.papers.trainings import TRAININGS

SMALL = {
    "classes": 4,
    "train_images": 16,
    "val_images": 8,
    "test_images": 4,
    "batch_size": 8,
    "channels": 4,
    "epochs": 1,
}
SMALL |= {"ppd_hidden": 8, "ppd_channels": 4, "generator_images": 8, "device": "cpu", "precision": "fp32", "jobs": 1}
SMALL |= {f"{part}_epochs": 1 for part in ("generator", "decoder", "classifier", "probe", "cam", "tscam", "literal")}
SMALL |= {"backbone": "vit_mini_dino", "compared": ["has"], "probe": "sgd", "transformer": "vit_mini_plain"}


DECLARED = {notebook: notebook_parameters(notebook) for notebook in (*TRAININGS, "30_locloc_grabcut")}


def opened(notebook, **changes):
    known = SMALL | changes
    parameters = {name: known.get(name, one.default) for name, one in DECLARED[notebook].items()}
    return runs.start(notebook, parameters), parameters


def built(capsys):
    """Return how many artefacts were made, by the lines that tell it."""
    return sum(line.startswith("built ") for line in capsys.readouterr().out.splitlines())


def trained(notebook, capsys, **changes):
    """Train, and return how many artefacts were made, with the run and its parameters."""
    run, parameters = opened(notebook, **changes)
    capsys.readouterr()
    TRAININGS[notebook](run, parameters)
    return built(capsys), run, parameters


def test_the_pair_and_the_training_by_the_text_alone(root, capsys):
    made, run, parameters = trained("11_scm_training", capsys)
    assert made == 3
    pair = scm.Pair(**parameters)
    splits = pair.splits()
    pair.fit_all(run, scm.PAIR, [0], splits)
    literal = pair.fit_literal(run, 0, splits, 1)
    assert built(capsys) == 0
    assert pair.changed(preset="paper").recipe("scm", 0).options["config"]["residual"]
    assert not literal.model.calibration.config.residual


def test_the_baselines(root, capsys):
    made, run, parameters = trained("03_cam_and_tscam", capsys)
    assert made == 3
    baselines = scm.Baselines(**parameters)
    baselines.fit_all(run, ["cam", "tscam", "has"], parameters["seeds"], baselines.splits())
    assert built(capsys) == 0


def test_the_multi_label_classifier(root, capsys):
    made, run, parameters = trained("20_lpcam_classifier", capsys, backbone="resnet_mini")
    assert made == 1
    lpcam.Classifier(**parameters).host(run)
    assert built(capsys) == 0


def test_the_parts_of_locloc_and_ppd(root, capsys):
    first, masks = opened("30_locloc_grabcut")
    first.save_metrics({"table": []})
    made, run, decoders = trained("31_locloc_generator", capsys)
    assert made == 3  # the masks, the generator, the decoder
    run.save_metrics({"table": []})
    made, run, classifiers = trained("32_locloc_classifier", capsys)
    assert made == 2  # the classifier, the probe
    experiment = locloc.Experiment(masks=masks, decoders=decoders, classifiers=classifiers)
    experiment.assemble(run, 0, experiment.masks.taught(run, experiment.masks.splits().train), progress=False)
    assert built(capsys) == 0


def test_rand_augment_is_the_classifiers_alone(root):
    policy = {"classifier_augment": "rand-m9-mstd0.5-inc1"}
    settings = [
        opened(notebook, **policy)[1]
        for notebook in ("30_locloc_grabcut", "31_locloc_generator", "32_locloc_classifier")
    ]
    experiment = locloc.Experiment(**dict(zip(("masks", "decoders", "classifiers"), settings, strict=True)))
    found = {part: experiment.recipe(part, 0).augment for part in ("generator", "decoder", "classifier", "probe")}
    assert found == {"generator": "none", "decoder": "none", "classifier": "rand-m9-mstd0.5-inc1", "probe": "none"}
    last = experiment.recipe("classifier", 0).train_transform((0.1, 0.2, 0.3)).transforms[-1]
    assert (type(last).__name__, last.policy, last.mean) == (
        "RandAugment",
        policy["classifier_augment"],
        (0.1, 0.2, 0.3),
    )
