"""What a model looks at: rollout, gradients and figure 7 against plain definitions, and a task of which the answer is
known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import ADDED, KINDS, SMALL, model_of
from folders import images as images_of
from numpy.typing import NDArray
from torch import Tensor, nn

import vitrail
from vitrail.errors import BadInput
from vitrail.explanation import explain, passage
from vitrail.settings import Classifier
from vitrail.vit import fused
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import Attention, VisionTransformer
from vitrail.vit.resnet import ResNetClassifier, ResNetConfig

Array = NDArray[np.float64]


def numpy_rollout(model: VisionTransformer, image: Array) -> Array:
    """The rollout of one image, of the weights alone: the whole model in NumPy, in 64 bits."""
    config, w = model.config, {name: weight.double().numpy() for name, weight in model.state_dict().items()}

    def norm(x: Array, name: str) -> Array:
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def softmax(x: Array) -> Array:
        x = np.exp(x - x.max(1, keepdims=True))
        return x / x.sum(1, keepdims=True)

    side, size = config.grid, config.patch_size
    cells = [image[:, r * size :, c * size :][:, :size, :size].ravel() for r in range(side) for c in range(side)]
    kernel = w["patch_embedding.projection.weight"].reshape(config.hidden_size, -1)
    patches = np.stack(cells) @ kernel.T + w["patch_embedding.projection.bias"]
    token = config.classifier == "token"
    positions = w["position_embedding"][0]
    front = [w["class_token"][0] + positions[:1]] if token else []
    x = np.concatenate([*front, patches + positions[int(token) :]])
    joint = np.eye(len(x))
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        q, k, v = np.split(linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv"), 3, axis=1)
        mixed, mean, width = np.zeros_like(x), np.zeros((len(x), len(x))), config.hidden_size // config.num_heads
        for head in range(config.num_heads):
            own = slice(head * width, (head + 1) * width)
            weights = softmax(q[:, own] @ k[:, own].T / np.sqrt(width))
            mixed[:, own] = weights @ v[:, own]
            mean += weights / config.num_heads
        rows = mean + np.eye(len(x))
        joint = rows / rows.sum(1, keepdims=True) @ joint
        x = x + linear(mixed, f"{block}.attention.out")
        hidden = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.hidden")
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(hidden, f"{block}.mlp.out")
    patches_from = config.num_prefix_tokens
    row = joint[0] if token else joint[patches_from:].mean(0)
    return row[patches_from:].reshape(side, side)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_rollout_is_that_of_numpy(config: ViTConfig) -> None:
    model, images = model_of(config), images_of(config)
    expected = np.stack([numpy_rollout(model, image) for image in images.double().numpy()])
    np.testing.assert_allclose(explain.rollout(model, images).numpy(), expected, atol=1e-5, rtol=0)
    assert np.ptp(expected) > 1e-3  # so that it is no flat map that agrees


@pytest.mark.parametrize("config", (KINDS | ADDED).values(), ids=KINDS | ADDED)
def test_gradient_rollout_is_equations_5_and_6(config: ViTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = model_of(config), images_of(config)
    classes = [2, 0, 1]
    plain, kept = Attention.softmax, list[Tensor]()

    def keep(q: Tensor, k: Tensor) -> Tensor:
        kept.append(plain(q, k))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "softmax", staticmethod(keep))
        patch.setattr(fused, "CUSTOM_GRADIENTS", False)  # of which weights are no part that others can see
        logits = model.forward_head(model.forward_encoder(model.embed(images)))  # the whole of all layers
    assert len(kept) == config.num_layers
    gradients = torch.autograd.grad(logits[range(3), classes].sum(), kept)
    joint = torch.eye(config.num_tokens)
    for weights, gradient in zip(kept, gradients, strict=True):
        relevance = (weights * gradient).clamp(min=0).mean(1)
        joint = joint + relevance @ joint
    front = config.num_prefix_tokens
    row = joint[:, 0] if config.classifier == "token" else joint[:, front:].mean(1)
    found = explain.gradient_rollout(model, images, classes)
    torch.testing.assert_close(found.flatten(1), row[:, front:], atol=1e-5, rtol=1e-4)
    assert (found.flatten(1).std(1) > 1e-5).all()  # so that it is no flat map that agrees
    predicted = explain.gradient_rollout(model, images)
    torch.testing.assert_close(predicted, explain.gradient_rollout(model, images, logits.argmax(1).tolist()))
    assert all(weight.grad is None for weight in model.parameters())


def riddle(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images of 4 × 4 patches, each of one of three colours. The class is the colour of the one patch that has a white
    corner: images, classes, and which patch it is."""
    colours = torch.randint(3, (count, 16), generator=generator)
    deciding, each = torch.randint(16, (count,), generator=generator), torch.arange(count)
    cells = torch.rand(count, 16, 3, 4, 4, generator=generator) - 1 + F.one_hot(colours, 3)[..., None, None]
    cells[each, deciding, :, :2, :2] = 1
    images = cells.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 16, 16)
    return images, colours[each, deciding], deciding


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_the_patch_that_decides_is_found(classifier: Classifier) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = ViTConfig(16, 4, 32, 64, 2, 2, num_classes=3, classifier=classifier)
    model = VisionTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)
    for _ in range(120):
        images, labels, _ = riddle(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels, deciding = riddle(400, generator)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.99  # else there is nothing to explain
    found = explain.rollout(model, images).flatten(1).argmax(1)
    assert (found == deciding).float().mean() >= 0.95


def test_attention_and_what_heads_read() -> None:
    for config in (SMALL, replace(SMALL, classifier="gap")):
        model, images = model_of(config).train(), images_of(config)
        model.blocks[1].eval()  # frozen, say
        before = [module.training for module in model.modules()]
        weights = vitrail.attention(model, images, layers=[1])
        assert [module.training for module in model.modules()] == before
        assert weights.keys() == {1}
        torch.testing.assert_close(weights[1].sum(-1), torch.ones(3, 3, config.num_tokens))
        front = config.num_prefix_tokens
        row = weights[1][:, :, 0] if config.classifier == "token" else weights[1][:, :, front:].mean(2)
        read = explain.read_by_heads(model, images)
        torch.testing.assert_close(read[1], row[..., front:].unflatten(-1, (4, 4)))
        assert read.keys() == {0, 1}
        torch.testing.assert_close(vitrail.attention(model, images, layers=1), weights)  # a layer by itself
        torch.testing.assert_close(explain.read_by_heads(model, images, 1), {1: read[1]})
        assert model.attention(images, 0).keys() == {0}
        with pytest.raises(BadInput, match="the model has layers 0 to 1, and no layer -1"):
            vitrail.attention(model, images, layers=[0, -1])
        with pytest.raises(BadInput, match="layers 0 to 1, and no layer 2"):
            explain.read_by_heads(model, images, [2])
        assert explain.read_by_heads(model, images, []) == vitrail.attention(model, images, []) == {}


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = model_of(SMALL), images_of(SMALL, 5)
    ask: list[Callable[[], Tensor]] = [
        lambda: explain.attention(model, images)[1], lambda: explain.rollout(model, images),
        lambda: explain.gradient_rollout(model, images, [0, 1, 2, 0, 1]),
        lambda: explain.read_by_heads(model, images)[0], lambda: explain.attention_distance(model, images),
    ]  # fmt: skip
    together = [each() for each in ask]
    cost = SMALL.num_tokens * (SMALL.num_layers * SMALL.hidden_size + 3 * SMALL.mlp_dim)
    monkeypatch.setattr(passage, "PART", 2 * cost)
    seen: list[int] = []

    def embed(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return VisionTransformer.embed(model, batch)

    monkeypatch.setattr(model, "embed", embed)
    for each, expected in zip(ask, together, strict=True):
        torch.testing.assert_close(each(), expected)
    assert seen == [2, 2, 1] * len(ask)

    few, plain, sizes = 4 * SMALL.num_heads * SMALL.num_tokens, Attention.softmax, list[int]()

    def softmax(q: Tensor, k: Tensor) -> Tensor:
        weights = plain(q, k)
        sizes.append(weights.numel())
        return weights

    monkeypatch.setattr(passage, "PART", few)
    monkeypatch.setattr(Attention, "softmax", staticmethod(softmax))
    for each, expected in zip(ask, together, strict=True):
        torch.testing.assert_close(each(), expected)
    assert max(sizes) == few  # 4 rows of one image, of the 17 that there are


def test_attention_distance_is_the_mean_of_all_distances() -> None:
    config = replace(SMALL, image_size=8, patch_size=2)
    model, images = model_of(config), images_of(config, 2)
    weights = vitrail.attention(model, images)
    expected = np.zeros((2, 3))
    for layer in range(2):
        for head in range(3):
            rows = []
            for image in range(2):
                for query in range(16):
                    to = weights[layer][image, head, 1 + query, 1:].double().numpy()
                    far = [2 * np.hypot(query // 4 - key // 4, query % 4 - key % 4) for key in range(16)]
                    rows.append(np.average(far, weights=to))
            expected[layer, head] = np.mean(rows)
    np.testing.assert_allclose(explain.attention_distance(model, images).numpy(), expected, rtol=1e-5)


def test_filters_are_principal_components() -> None:
    model = model_of(SMALL)
    found = explain.embedding_filters(model, 10).flatten(1).double().numpy()
    kernels = model.patch_embedding.projection.weight.detach().flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(kernels.T))
    for mine, theirs in zip(found, vectors.T[::-1], strict=False):
        assert abs(mine @ theirs) == pytest.approx(1, abs=1e-5)
        assert mine[np.abs(mine).argmax()] > 0
    assert len(found) == 10
    assert len(explain.embedding_filters(model, 100)) == (values > 1e-12).sum() == 23  # one less than filters


def test_filters_as_images_without_colour_have_them() -> None:
    model = model_of(SMALL)
    found = explain.embedding_filters(model, 100, grey=True)
    torch.testing.assert_close(found[:, :1].expand_as(found), found)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(len(found)))
    weight = model.patch_embedding.projection.weight.detach()
    with torch.no_grad():  # to images without colour, this embedding is the same
        weight += 9 * torch.tensor([1.0, -2.0, 1.0])[:, None, None] * weight[:, :1].roll(1, 0)
    torch.testing.assert_close(explain.embedding_filters(model, 100, grey=True), found, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(explain.embedding_filters(model, 3), found[:3], atol=0.1)


def test_similarities_are_cosines() -> None:
    for config in (SMALL, replace(SMALL, classifier="gap")):
        model = model_of(config)
        own = model.position_embedding.detach()[0, -16:]
        found = explain.position_similarity(model)
        expected = own[6] @ own[13] / own[6].norm() / own[13].norm()
        assert found[1, 2, 3, 1].item() == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(found[2, 2, 2, 2], torch.tensor(1.0))


def test_what_a_model_lacks_is_said() -> None:
    convolutions, hybrid = replace(SMALL, stem="convolutions"), replace(SMALL, resnet_blocks=(), patch_size=2)
    for config, words in ((convolutions, "convolutions one after another"), (hybrid, "a ResNet")):
        with pytest.raises(BadInput, match=f"makes tokens by {words}, and has no filters"):
            explain.embedding_filters(VisionTransformer(config))
    assert explain.position_similarity(VisionTransformer(convolutions)).shape == (4, 4, 4, 4)
    model, images = model_of(SMALL), images_of(SMALL)
    cnn: Any = ResNetClassifier(ResNetConfig(32, 3, 32, (1,)))
    for ask in (vitrail.attention, explain.rollout, explain.gradient_rollout, explain.read_by_heads,
                explain.attention_distance):  # fmt: skip
        with pytest.raises(BadInput, match="a ResNet has no attention"):
            ask(cnn, images)
    for find in (explain.embedding_filters, explain.position_similarity):
        with pytest.raises(BadInput, match="a ResNet has no attention"):
            find(cnn)
    with pytest.raises(BadInput, match="3 images and 2 classes"):
        explain.gradient_rollout(model, images, [0, 1])
    with pytest.raises(BadInput, match="classes 0 to 2, and no class 3"):
        explain.gradient_rollout(model, images, [0, 1, 3])
    nn.init.ones_(model.patch_embedding.projection.weight)
    with pytest.raises(BadInput, match="filters are all the same"):
        explain.embedding_filters(model)


def test_stored_images_are_seen_as_in_evaluation() -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (16 + more, 18, 3), dtype=np.uint8) for more in range(3)]
    model = model_of(replace(SMALL, dropout=0.5)).train()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    before = torch.random.get_rng_state()
    found = explain.attended(model, pictures, mean, std)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)  # training goes on to the same bits
    squares = explain.squares(pictures, 16)
    np.testing.assert_array_equal(squares[2], pictures[2][1:17, 1:17])
    images = torch.stack([torch.from_numpy(square.copy()).permute(2, 0, 1) / 255 for square in squares])
    images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(np.stack(found), explain.rollout(model, images).numpy(), atol=1e-6)
    assert found[0].dtype == np.float32
    assert explain.attended(model, []) == []
    with pytest.raises(BadInput, match="17 × 15 is too small for 16 pixels"):
        explain.attended(model, [np.zeros((15, 17, 3), np.uint8)])
    with pytest.raises(BadInput, match="a ResNet has no attention"):
        explain.attended(ResNetClassifier(ResNetConfig(32, 3, 32, (1,))), pictures)
