"""ulr.ULR on models that nobody here wrote, unmodified: every parameter gets its gradient, and training works."""

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import v
from torch import nn

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 7, 1, 9, 4], [2, 5, 8, 1, 6], [9, 9, 2, 4, 3], [1, 6, 5, 7, 8]])
LABELS = torch.arange(4) % 3


def classes(outputs, labels):
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels, reduction="none")


def next_token(outputs, ids):
    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def squares(outputs, targets):
    return (outputs - targets).square().flatten(1).sum(1) / 2


def bert():
    settings = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=6, num_labels=3,
    )  # fmt: skip
    mask = torch.ones_like(IDS)
    mask[0, 4] = 0
    return (
        transformers.BertForSequenceClassification(settings),
        {"input_ids": IDS, "attention_mask": mask},
        LABELS,
        classes,
    )


def gpt2():
    settings = transformers.GPT2Config(
        vocab_size=12, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(settings), {"input_ids": IDS, "use_cache": False}, IDS, next_token


def vit():
    settings = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(settings), v(1, 4, 3, 8, 8), LABELS, classes


def resnet18(width=64):
    hidden = [width, 2 * width, 4 * width, 8 * width]
    settings = transformers.ResNetConfig(
        embedding_size=width, hidden_sizes=hidden, depths=[2, 2, 2, 2], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(settings), v(1, 4, 3, 16, 16), LABELS, classes


def transformer():
    model = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
    return model, (v(1, 4, 3, 8), v(2, 4, 2, 8)), v(3, 4, 2, 8), squares


# Initial weights of these models are so small that most gradients are, too: values of a trained network's size.
def lively(model):
    for index, (name, parameter) in enumerate(model.named_parameters()):
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data.copy_(v(100 + index, *parameter.shape) / fan_in**0.5)
        if parameter.dim() == 1 and "weight" in name:
            parameter.data.abs_().add_(0.5)  # gains
    return model


@pytest.mark.parametrize("make", [bert, gpt2, vit, transformer])
def test_cosines_follow_the_law(make):
    model, x, y, loss_fn = make()
    report = ulr.check(lively(model), x, y, loss_fn, sigma=1e-2, copies=64, steps=8)
    assert report.ok, report
    for layer in report.layers:
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=max(0.05, 5 * layer.cosine_error)), report


def test_a_residual_network_follows_the_law():
    """The shortcuts' normalisations have the noise of the branch that they are added to. A quarter of the published
    width: the cosines are larger, so that less is lost in their errors."""
    model, x, y, loss_fn = resnet18(width=16)
    report = ulr.check(lively(model), x[:2, :, :8, :8], y[:2], loss_fn, sigma=1e-2, copies=4, steps=8)
    assert len(report.layers) == 41
    for layer in report.layers:
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=max(0.05, 5 * layer.cosine_error)), report


def test_tokens_of_a_causal_model_affect_later_losses():
    """GPT-2's head is its embedding: rows of the tokens that it embeds, then of those that it predicts."""
    model, x, y, _ = gpt2()
    tokens = IDS.shape[1]
    causal, own = torch.ones(tokens, tokens).triu()[:, :-1], torch.eye(tokens)[:, :-1]  # the last predicts nothing
    affects = {"": causal, "transformer.wte": torch.cat([causal, own]), "transformer.ln_f": own}
    affects |= {f"transformer.h.0.{name}": own for name in ("attn.c_proj", "ln_2", "mlp")}

    def next_tokens(outputs, ids):
        losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1)

    settings = {"sigma": 1e-2, "copies": 64, "steps": 24, "seed": 1}
    near = ulr.check(lively(model), x, y, next_tokens, affects=affects, **settings)
    far = ulr.check(model, x, y, lambda outputs, ids: next_tokens(outputs, ids).mean(1), **settings)
    assert near.ok and far.ok, (near, far)
    for one, other in zip(near.layers, far.layers, strict=True):
        assert one.cosine > other.cosine + 0.05, (near, far)


STEPS = 200


@pytest.mark.parametrize("make, threshold", [(bert, 0.1), (gpt2, 0.4), (vit, 0.1), (transformer, 2.5)])
def test_training(make, threshold):
    """All parameters, joint injection. Before: ln 3 and ln 12 for classes and tokens."""
    model, x, y, loss_fn = make()
    estimator = ulr.ULR(lively(model), sigma=0.02, copies=64, injection="joint")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = estimator.backward(x, y, loss_fn)
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
    assert loss < threshold


def test_training_a_residual_network():
    """Eleven million parameters as the published ResNet-18 initialises them."""
    torch.manual_seed(0)
    model, x, y, loss_fn = resnet18()
    model.eval()  # three samples of a few pixels have no statistics to normalise by
    estimator = ulr.ULR(model, sigma=0.01, copies=32, antithetic=False, injection="joint")
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-4)
    losses = []
    for _ in range(90):
        optimizer.zero_grad()
        losses.append(float(estimator.backward(x[:3, :, :8, :8], y[:3], loss_fn)))
        optimizer.step()
    assert losses[0] > 1.05  # ln 3 is 1.099
    assert losses[-1] < 0.1
