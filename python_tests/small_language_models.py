"""Language models of a few thousand weights, saved as transformers saves real ones, and sentences for them."""

from __future__ import annotations

from pathlib import Path

import torch

from ulr_kernels.finetune.models import transformers

GOOD, BAD = ("fine", "great", "happy", "lovely"), ("awful", "boring", "poor", "terrible")
_FILLER = ("a", "film", "it", "plot", "the", "was")
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = sorted({*GOOD, *BAD, *_FILLER, "Review", "Sentiment", ":", "negative", "positive", "N", "/", "A", "[", "]"})


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentence and label, the classes in turn: three words of filler and one that tells the class."""
    generator = torch.Generator().manual_seed(seed)

    def one(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    return [
        (f"{one(_FILLER)} {one((BAD, GOOD)[row % 2])} {one(_FILLER)} {one(_FILLER)}", ("negative", "positive")[row % 2])
        for row in range(count)
    ]


def write_tsv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(f"{sentence}\t{label}\n" for sentence, label in rows))


def write_sentences(folder: Path) -> Path:
    """A folder of train, dev and test sentences."""
    folder.mkdir()
    for seed, (part, count) in enumerate((("train", 64), ("dev", 20), ("test", 20))):
        write_tsv(folder / f"{part}.tsv", sentences(count, seed))
    return folder


def write_encoder(folder: Path) -> Path:
    """A BERT of one layer."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join((*_MARKS, *_WORDS)))
    transformers().BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    config = transformers().BertConfig(
        vocab_size=len(_MARKS) + len(_WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    _save(transformers().BertModel, config, folder)
    return folder


def write_causal(folder: Path) -> Path:
    """A Llama of one layer, with tied embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    words = {word: number for number, word in enumerate((*_MARKS, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers().LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    _save(transformers().LlamaForCausalLM, config, folder)
    return folder


def _save(kind, config, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
