"""The optimisers on models of transformers, as they are, with adapters of peft, and under the Trainer."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from small_models import cross_entropy, modules_may_draw  # noqa: F401
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.finetune import models
from ulr_kernels.optim import EGGROLL, MeZO

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
transformers = models.transformers()
peft = pytest.importorskip("peft")

TOKENS = torch.arange(48).view(8, 6) * 7 % 29 + 1  # 0 is padding, whose gradient autograd leaves out
LABELS = torch.arange(8) % 2


def encoder():
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=2,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config)
    model.bert.embeddings.token_type_embeddings.requires_grad_(False)
    return model


def decoder():
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config)


def loss_of(model) -> Tensor:
    return model(input_ids=TOKENS, labels=LABELS if model.config.model_type == "bert" else TOKENS).loss


@pytest.mark.parametrize("make", [encoder, decoder])
def test_models_are_probed_as_they_are(make):
    """The probes' difference is autograd's slope along the same noise; so every trained weight was perturbed once."""
    model = make().eval()
    optimizer = MeZO(model, lr=0.0, eps=1e-3)
    optimizer.step(lambda: loss_of(model))
    loss_of(model).backward()
    keys = {name: ulr.fold_in(ulr.fold_in(0, 0), site) for name, site in sites(model).items()}
    slope = sum((p.grad * ulr.noise_like(p, keys[n])).sum() for n, p in model.named_parameters() if n in keys)
    assert abs(optimizer.last_update.coefficients.item() / 1e-3 - slope) < 5e-3 * max(1.0, abs(slope))


def sites(model) -> dict[str, int]:
    return {n: noise_contract.site_id(n) for n, p in model.named_parameters() if p.requires_grad}


def test_a_population_of_encoders_in_one_forward():
    model = encoder().eval()
    mask = torch.ones_like(TOKENS)
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    optimizer = EGGROLL(model, lr=0.3, sigma=0.05, population=8)
    optimizer.accumulate(lambda: loss_of(model))
    alone = optimizer._losses.pop()
    optimizer.accumulate_batch(inputs, LABELS, lambda out, y: cross_entropy(out.logits, y))
    torch.testing.assert_close(optimizer._losses.pop().mean(1, keepdim=True), alone, rtol=1e-5, atol=1e-5)


def test_lora_trains_the_adapters_alone():
    model = encoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    )
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = MeZO(adapted, lr=0.2, eps=1e-2, probes=4)
    losses = [optimizer.step(lambda: loss_of(adapted)).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, start[n])}
    assert changed == trained and all("lora_" in name for name in trained)
    adapted.unload()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- the Trainer -----------------------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, index):
        return {"input_ids": TOKENS[index], "labels": LABELS[index]}


def trainer(folder, model, **settings):
    from ulr_kernels.finetune.trainer import ForwardTrainer

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        **settings,
    )
    optimizer = MeZO(model, lr=0.1, eps=1e-2, probes=2)
    data = Sentences()
    return ForwardTrainer(model, args, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None))


def test_trainer_accumulates_schedules_evaluates_and_resumes(tmp_path):
    model = encoder()
    run = trainer(tmp_path / "whole", model, max_steps=6, save_steps=3, eval_strategy="steps", eval_steps=3)
    run.train()
    history = run.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]
    assert run.probing.steps == 6
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1 * (1 - step / 6) for step in range(6)])
    assert all(p.grad is None for p in model.parameters())
    other = encoder()
    resumed = trainer(tmp_path / "whole", other, max_steps=6, save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_of_the_trainer_is_the_mean_over_its_micro_batches(tmp_path):
    model, by_hand = encoder(), encoder()
    run = trainer(tmp_path, model, max_steps=1, save_strategy="no", train_sampling_strategy="sequential")
    run.train()
    optimizer = MeZO(by_hand, lr=0.1, eps=1e-2, probes=2)
    for part in (slice(0, 2), slice(2, 4)):
        optimizer.accumulate(lambda part=part: by_hand(input_ids=TOKENS[part], labels=LABELS[part]).loss)
    loss = optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-3)


def test_trainer_refuses_other_optimisers(tmp_path):
    from ulr_kernels.finetune.trainer import ForwardTrainer

    with pytest.raises(ValueError, match="'optimizers' must hold one of ulr.optim, got NoneType"):
        ForwardTrainer(encoder(), transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
