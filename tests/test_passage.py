"""A passage of images through a model: nothing else than the forward pass, nothing twice, and in float32 alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from folders import ADDED, KINDS, SMALL, model_of
from folders import images as images_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitrail
from vitrail.data.cache import Images
from vitrail.explanation import explain, passage
from vitrail.explanation.looks import Explained, look
from vitrail.vit.config import HALF, ViTConfig
from vitrail.vit.model import Attention, TransformerEncoderBlock, VisionTransformer


@pytest.mark.parametrize("config", (KINDS | ADDED).values(), ids=KINDS | ADDED)
def test_a_passage_is_the_forward_pass(config: ViTConfig) -> None:
    model, images = model_of(config), images_of(config)
    with passage.as_used(model):
        through = passage.Passage(model, images)
        torch.testing.assert_close(through.logits(), model(images))
        for _, block, tokens in through.layers:
            after, (q, k, v), taken = passage.explicit(block, tokens)
            weights = block.attention.weights(block.attention_norm(tokens))
            torch.testing.assert_close(after, block(tokens))
            torch.testing.assert_close(Attention.softmax(q, k), weights)
            torch.testing.assert_close(taken, weights @ v)
    for layer, weights in vitrail.attention(model, images).items():
        torch.testing.assert_close(weights, model.attention(images)[layer])


def test_no_layer_is_computed_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = model_of(replace(SMALL, num_layers=4)), images_of(SMALL)
    computed: list[nn.Module] = []
    forward = TransformerEncoderBlock.forward

    def count(block: TransformerEncoderBlock, *args: Any, **settings: Any) -> Tensor:
        computed.append(block)
        return forward(block, *args, **settings)

    monkeypatch.setattr(TransformerEncoderBlock, "forward", count)
    for layers in ([2], [0, 2]):
        for ask in (VisionTransformer.attention, vitrail.attention, explain.read_by_heads):
            computed.clear()
            assert list(ask(model, images, layers)) == layers
            assert computed == [model.blocks[0], model.blocks[1]]
    computed.clear()
    with passage.as_used(model):
        through = passage.Passage(model, images)
        for said in (through.logits, through.rollout, through.gradient_rollout, through.distances):
            said()
    assert computed == list(model.blocks)


class OnlyOnCPU(TorchFunctionMode):
    """Refuses float64 of what has not been fetched from its device, where MPS has no such numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            self.fetched.append(found)
        elif isinstance(found, Tensor) and found.dtype == torch.float64:
            near = [arg for arg in args if isinstance(arg, Tensor)]
            assert any(arg.dtype == torch.float64 or any(arg is one for one in self.fetched) for arg in near), func
        return found


def test_no_float64_on_the_device() -> None:
    explained = Explained(
        "vit", model_of(SMALL), ("a", "b", "c"), HALF, HALF, told=True, made_for=16, shorter_side=None
    )
    pictures = Images.pack([np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)], ["x"])
    with OnlyOnCPU():
        look(explained, pictures, None)
        explain.embedding_filters(explained.model)
        with pytest.raises(AssertionError, match="double"):
            torch.zeros(1).double().cpu()
