"""The model that adapts: images to logits, with the features and the linear head where a method needs them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deepclust.errors import AdaptationError


class Classifier(nn.Module):
    """A featurizer and a linear head.

    Args:
        featurizer: Images to features (batch, dim).
        head: Features to logits.

    Raises:
        AdaptationError: If the head is not linear, or has fewer than two classes.
    """

    def __init__(self, featurizer: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise AdaptationError(
                f"expected a head of type nn.Linear, got {type(head).__name__}; "
                "move the layers before the last linear one into the featurizer"
            )
        if head.out_features < 2:
            raise AdaptationError(f"expected a head with at least two classes, got {head.out_features}")
        self.featurizer = featurizer
        self.head = head

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, dim) and logits (batch, classes) of images.

        Raises:
            AdaptationError: If the features do not fit the head.
        """
        features: Tensor = self.featurizer(images)
        if features.shape != (len(images), self.head.in_features):
            raise AdaptationError(
                f"expected features ({len(images)}, {self.head.in_features}), got {tuple(features.shape)}; "
                "give the head that was trained on this featurizer, and flatten what the featurizer returns"
            )
        return features, self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images."""
        return self.outputs(images)[1]

    def check_head(self) -> None:
        """Raises AdaptationError if there is no linear head; here there always is."""

    def rely_on_head(self) -> None:
        """Check from now on that the output is the head's; here it always is."""

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the head, none where there is no linear head."""
        return self.head.parameters()


class WholeModel(Classifier):
    """Any model that returns logits; its head is found in it, and its features are what the head is given.

    Nothing is taken apart: what the head receives and returns is read while the model runs.

    Args:
        model: Images to logits (batch, classes).
        head: Dotted name of the last linear layer; None takes the last nn.Linear that is registered, if there is one.
            A model without one still fits the methods that need neither features nor head.

    Raises:
        AdaptationError: If there is no linear layer of that name.
    """

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        nn.Module.__init__(self)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if head is not None and head not in linear:
            raise AdaptationError(
                f"expected head to name a linear layer of the model, got {head!r}; it has "
                f"{', '.join(linear[-3:]) or 'none'}"
            )
        self.model = model
        self.check_output = False
        self.head_name = head if head is not None else (linear[-1] if linear else None)

    # nn.Module keeps submodules in a dict of its own: a property does not hide one.
    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """The linear head."""
        self.check_head()
        assert self.head_name is not None
        head = self.model.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def check_head(self) -> None:
        """Raises AdaptationError if the model has no linear layer."""
        if self.head_name is None:
            raise AdaptationError(
                "expected a classifier with a linear head (nn.Linear), got a model without any linear layer; use an "
                "adapter that needs none (source, bn; with parameters affine or all also tent, pseudo_label, shot_im, "
                "rotta, roid), or train a linear head"
            )

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the head, none where there is no linear head."""
        return () if self.head_name is None else self.head.parameters()

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, dim) that the head is given, and logits (batch, classes) of the model.

        Raises:
            AdaptationError: If the model's output is not its head's.
        """
        seen: list[tuple[Tensor, Tensor]] = []

        def see(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], made: Tensor) -> None:
            seen.append((next(iter((*given, *named.values()))), made))

        handle = self.head.register_forward_hook(see, with_kwargs=True)
        try:
            logits = self._logits(images)
        finally:
            handle.remove()
        if len(seen) != 1 or not (seen[0][1] is logits or torch.equal(seen[0][1], logits)):
            raise AdaptationError(
                f"expected the model to return what its linear head {self.head_name!r} returns; "
                "name the right layer: WholeModel(model, head=…), or give Classifier(featurizer, head)"
            )
        return seen[0][0], logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images.

        Raises:
            AdaptationError: If the model returns anything else, or `rely_on_head` was called and it is not its head's.
        """
        return self.outputs(images)[1] if self.check_output else self._logits(images)

    def rely_on_head(self) -> None:
        """From now on check that each output is the head's, which may be guessed."""
        self.check_output = True

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise AdaptationError(f"expected a model that returns logits ({len(images)}, classes), got {got}")
        return logits


def check_images(images: Tensor) -> None:
    """Check a batch before anything learns from it.

    Raises:
        AdaptationError: If it is empty, not of floats, or holds NaN or infinity.
    """
    if images.ndim < 2 or not len(images):
        raise AdaptationError(f"expected a batch of images (batch, …), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise AdaptationError(f"expected images as floats, got {images.dtype}; scale them as the source model expects")
    if not torch.isfinite(images).all():
        raise AdaptationError("expected finite images, got NaN or infinity; drop or mend these images")


def as_classifier(model: nn.Module) -> Classifier:
    """The model itself if it is a classifier of ours, else around it. No copy is made."""
    return model if isinstance(model, Classifier) else WholeModel(model)
