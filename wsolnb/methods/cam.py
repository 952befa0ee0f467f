"""Class activation maps of convolutional classifiers: CAM (Zhou et al., 2016) and LayerCAM (Jiang et al., 2021)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from wsolnb.backbones import ConvBackbone, create_backbone, linear_classifier, published_classifier
from wsolnb.errors import ParameterError, nearest
from wsolnb.methods import register
from wsolnb.methods.base import LocalizationModel, pick


def cam(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """CAM, M_c(x, y) = ReLU(sum_k w_k^c f_k(x, y)).

    features: (B, K, h, w), the maps that global average pooling sees. weight: (C, K) of the linear classifier.
    classes: (B,) class of each image. Returns (B, h, w), not normalised, >= 0.
    Raises ParameterError for shapes that do not fit, or a class that the weights lack.
    """
    if features.ndim != 4 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        problem = f"features {tuple(features.shape)} and classifier weights {tuple(weight.shape)} do not fit"
        raise ParameterError(problem, "give (B, K, h, w) features and (C, K) weights of the layer behind the pooling")
    return torch.einsum("bkhw,bk->bhw", features, pick(weight.expand(len(features), -1, -1), classes)).relu()


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM, M_c(x, y) = ReLU(sum_k ReLU(d y_c / d A_k(x, y)) A_k(x, y)).

    activations A and gradients of the class score with respect to them: (B, K, h, w), of any layer.
    Returns (B, h, w), not normalised, >= 0.
    """
    check_layer(activations, gradients)
    return (gradients.relu() * activations).sum(dim=1).relu()


def check_layer(activations: Tensor, gradients: Tensor) -> None:
    """Raise ParameterError where activations and gradients are not both (B, K, h, w) of one layer."""
    if activations.shape != gradients.shape or activations.ndim != 4:
        problem = f"activations {tuple(activations.shape)} and gradients {tuple(gradients.shape)} differ"
        raise ParameterError(problem, "give both as (B, K, h, w) of the same layer")


def find_layer(backbone: nn.Module, name: str) -> nn.Module:
    """Return the backbone's submodule of that name, such as "resnet.layer3"; "" is the backbone itself.

    Raises ParameterError for an unknown name; the nearest one is given.
    """
    try:
        return backbone.get_submodule(name)
    except AttributeError as error:
        hint = nearest(name, [known for known, _ in backbone.named_modules() if known])
        raise ParameterError(f"no layer {name!r}{hint}", 'use a name of named_modules(), or "" (all)') from error


def layer_gradients(
    model: LocalizationModel, images: Tensor, classes: Tensor, layer: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return the activations A of a layer and the gradients d y_c / d A of the class scores; each (B, K, h, w).

    images: (B, 3, H, W), normalised. classes: (B,), the class c of each image. Also works under `torch.inference_mode`
    and with frozen weights. The model should be in evaluation mode, because it is run again.

        activations, gradients = layer_gradients(model, images, classes, model.backbone.get_submodule("resnet.layer2"))

    Raises ParameterError for a class that the model lacks, or a layer without a feature map on the way to the score.
    """
    held: list[Tensor] = []

    def hold(_module: nn.Module, _inputs: tuple, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.ndim != 4:
            raise ParameterError(f"{type(layer).__name__} gives no feature map", "choose a layer with (B, K, h, w)")
        # The graph starts here: no weight needs a gradient, and nothing before the layer is run backwards.
        held.append(value.detach().requires_grad_())
        # A copy goes on, because the next layer may be a ReLU in place, which would overwrite what is held.
        return held[-1].clone()

    handle = layer.register_forward_hook(hold)
    try:
        # A tensor of inference mode cannot take part in a gradient, its copy can.
        with torch.inference_mode(False), torch.enable_grad():
            score = pick(model(images.clone()).logits, classes.clone()).sum()
            reached = bool(held) and score.requires_grad
            gradients = torch.autograd.grad(score, held[-1], allow_unused=True)[0] if reached else None
    finally:
        handle.remove()
    if gradients is None:
        problem = f"the class score does not depend on this {type(layer).__name__}: the forward pass does not run it"
        raise ParameterError(problem, "choose a layer between the images and the final feature map")
    return held[-1].detach(), gradients


class CAMOutput(NamedTuple):
    """logits: (B, C). features: (B, K, h, w), the final feature map."""

    logits: Tensor
    features: Tensor


@register("cam")
class CAMClassifier(LocalizationModel):
    """A convolutional backbone, global average pooling and a linear classifier.

    bias: of the classifier. It moves the scores of whole images, and changes no map.
    """

    maps = ("cam", "layercam")

    def __init__(self, backbone: ConvBackbone, num_classes: int, bias: bool = False):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.dim, num_classes, bias=bias)

    @classmethod
    def published(cls, name: str, **options: Any) -> CAMClassifier:
        """Return a network with its published weights and classifier, in evaluation mode; nothing needs training.

            model = CAMClassifier.published("efficientnet_lite0")  # of ImageNet's 1,000 classes

        name, options: as of `create_backbone`, which raises the errors; see also `published_classifier`.
        """
        backbone, classifier = create_backbone(name, pretrained=True, **options), published_classifier(name)
        imagenet = ImageNetInfo()
        names = imagenet.label_descriptions() if classifier.out_features == imagenet.num_classes() else ()
        return cls._behind(backbone, classifier, names)

    @classmethod
    def of(cls, network: nn.Module, class_names: Sequence[str] = ()) -> CAMClassifier:
        """Return a classifier of your own, as it was trained, in evaluation mode; your network itself is not changed.

            network = timm.create_model("resnet18", num_classes=2)
            network.load_state_dict(torch.load("mine.pth", weights_only=True))
            model = CAMClassifier.of(network, ["cat", "dog"])

        network: of timm, with its classifier (`load_classifier` makes one of a file of weights). Its own bias is used
        where it has one. class_names: of its classes, in their order; empty where they are not known.
        Raises ParameterError as `linear_classifier` and `ConvBackbone` do, and for names that are not one per class.
        """
        classifier = linear_classifier(network, type(network).__name__)
        if class_names and len(class_names) != classifier.out_features:
            problem = f"{len(class_names)} names for a network of {classifier.out_features} classes"
            raise ParameterError(problem, "give one name per class, in the order of the training, or none")
        backbone = ConvBackbone(copy.deepcopy(network), type(network).__name__)
        return cls._behind(backbone, classifier, class_names)

    @classmethod
    def _behind(cls, backbone: ConvBackbone, classifier: nn.Linear, class_names: Sequence[str]) -> CAMClassifier:
        model = cls(backbone, classifier.out_features, bias=classifier.bias is not None)
        model.classifier.load_state_dict(classifier.state_dict())
        model.class_names = tuple(class_names)
        return model.eval()

    @property
    def head(self) -> nn.Module:
        """The classifier."""
        return self.classifier

    def forward(self, images: Tensor) -> CAMOutput:
        """Classify (B, 3, H, W) normalised images."""
        features = self.backbone(images)
        return CAMOutput(self.classifier(features.mean(dim=(2, 3))), features)

    def localize(self, output: CAMOutput, classes: Tensor) -> dict[str, Tensor]:
        """CAM and LayerCAM of the final layer for one class per image; each (B, h, w).

        Raises ParameterError for a class that the model lacks.
        """
        features = output.features.detach().float()
        weight = self.classifier.weight.detach().float()
        maps = {"cam": cam(features, weight, classes)}
        # Behind the final layer lie only the pooling and the linear classifier, so d y_c / d f_k(x, y) = w_k^c / hw.
        gradients = weight[classes][:, :, None, None].expand_as(features) / features[0, 0].numel()
        return maps | {"layercam": layer_cam(features, gradients)}

    def layer_cam(self, images: Tensor, classes: Tensor, layer: nn.Module) -> Tensor:
        """LayerCAM of any layer inside the backbone, such as `model.backbone.resnet.layer2`; (B, h, w).

        Raises ParameterError as `layer_gradients` does.
        """
        activations, gradients = layer_gradients(self, images, classes, layer)
        return layer_cam(activations.float(), gradients.float())
