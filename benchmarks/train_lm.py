"""Train a small language model with torch's cross entropy and with ours, and check that the loss curves agree.

    python benchmarks/train_lm.py                              # Python standard library, 32k vocabulary
    python benchmarks/train_lm.py --text wiki.txt --steps 500 --device cuda --dtype bfloat16

Three runs share the seed and the batches:

    torch            torch.nn.functional.cross_entropy
    genloss_kernels  genloss_kernels.cross_entropy
    control          torch's loss again, with every initial weight moved by one unit in the last place (ulp)

and with --head fused a fourth:

    fused head       genloss_kernels.linear_cross_entropy of the hidden states, so that the logits never exist

Training amplifies rounding differences, so two correct losses do not give equal curves. The control run shows how
far rounding alone drives them apart. With the largest distances over all steps

    ours_gap    = max |genloss_kernels - torch|, of both of our runs where there are two
    control_gap = max |control - torch|

the exit status is 0 if ours_gap <= max(3 * control_gap, floor), and 1 if not or if a curve holds a NaN or infinity.
The floor is 8 float32 ulps of the largest loss on torch's curve: a control run may agree with torch's to the last
bit, and another order of summation within the loss must still be allowed.

The check is sharpest while the distances stay near the floor, as they do with the defaults. At a learning rate of
1e-3 they grow exponentially, and how far one control run gets varies several times over from seed to seed.

AdamW hardly notices a constant factor on all gradients. Such an error may leave the curves together: this check
complements tests of the gradient and does not replace them.

Each run has a process of its own, so that peak memory is its own: the resident set size (RSS) on a CPU,
torch.cuda.max_memory_allocated on CUDA; "above baseline" leaves out what was in use before the first step. The runs
follow each other, so the machine's noise is in the ratios of step times; the control's ratio shows how much. With
--dtype bfloat16 the weights stay in float32 and the forward pass and the loss run under autocast.

Written to --out: train_lm.json, train_lm.png, and the tokeniser and token ids for the next call.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from curves import check_curves, device_name, loss_table, save_json, save_plot, speed_table, verdict
from lm_data import Corpus, prepare_corpus
from lm_train import Config, Objective, loss_from_hidden, loss_from_logits, train
from runs import Run, call_here, call_in_new_process

import genloss_kernels

FUSED = "fused head"

# How each run computes the loss from (model, inputs, labels).
OBJECTIVES: dict[str, Objective] = {
    "torch": partial(loss_from_logits, F.cross_entropy),
    "genloss_kernels": partial(loss_from_logits, genloss_kernels.cross_entropy),
    FUSED: partial(loss_from_hidden, genloss_kernels.linear_cross_entropy),
}


def main(argv: Sequence[str] | None = None, objectives: Mapping[str, Objective] = OBJECTIVES, isolate: bool = True) -> int:
    """Run the comparison and return the exit status; without `isolate` all runs share this process."""
    args = _parse_args(argv)
    config = Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})
    # Making the tokens takes memory, which a child of this process would begin with.
    call = call_in_new_process if isolate else call_here

    corpus: Corpus = call(prepare_corpus, args.text, args.max_mb * 10**6, config.vocab_size, args.out)
    if corpus.tokens <= config.seq_len:
        raise SystemExit(f"{corpus.source} has only {corpus.tokens} tokens: use a longer text or a shorter --seq-len")
    print(f"text    {corpus.source}, {corpus.text_bytes / 1e6:.1f} MB")
    print(f"tokens  {corpus.tokens}, of {corpus.tokenizer_entries} in the tokenizer")
    print(f"device  {device_name(config.device)}, {config.dtype}", flush=True)

    variants = [
        ("torch", objectives["torch"], False),
        ("genloss_kernels", objectives["genloss_kernels"], False),
        *([(FUSED, objectives[FUSED], False)] if args.head == "fused" else []),
        ("control", objectives["torch"], True),
    ]
    runs: dict[str, Run] = {
        name: call(_train_on_corpus, config, corpus, objective, perturb, name) for name, objective, perturb in variants
    }
    reference, *ours, control = (run.losses for run in runs.values())
    checks = [check_curves(reference, losses, control) for losses in ours]
    check = max(checks, key=lambda check: (not check.passed, check.ours_gap))
    save_plot(args.out / "train_lm.png", runs, check, "cross entropy (nats per token)")
    # Where the caches lie is this machine's business.
    text = {name: value for name, value in dataclasses.asdict(corpus).items() if not name.endswith("_path")}
    rest = {"config": dataclasses.asdict(config), "corpus": text}
    save_json(args.out / "train_lm.json", config.device, runs, check, **rest)
    print(f"\n{speed_table(runs, config.device)}\n\n{loss_table(runs)}\n\n{verdict(check)}")
    return 0 if check.passed else 1


def _train_on_corpus(config: Config, corpus: Corpus, objective: Objective, perturb: bool, name: str) -> Run:
    return train(config, corpus.load_tokens(), objective, perturb, name)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--head", choices=("logits", "fused"), default="logits", help="fused: train without logits as well")
    parser.add_argument("--text", type=Path, help="file or folder; None is the Python standard library")
    parser.add_argument("--max-mb", type=_positive, default=16, help="use at most this much of the text")
    parser.add_argument("--vocab-size", type=_positive, default=32768, help="width of the logits")
    parser.add_argument("--steps", type=_positive, default=60, help="optimizer steps of each run")
    parser.add_argument("--batch", type=_positive, default=8, help="sequences per step")
    parser.add_argument("--seq-len", type=_positive, default=128, help="tokens per sequence")
    parser.add_argument("--dim", type=_positive, default=192, help="model width")
    parser.add_argument("--layers", type=_positive, default=2, help="decoder blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--lr", type=float, default=3e-4, help="AdamW learning rate")
    parser.add_argument("--out", type=Path, default=Path("build/train_lm"), help="folder for results and caches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of PyTorch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    args = parser.parse_args(argv)
    if args.text is not None and not args.text.exists():
        parser.error(f"--text {args.text}: no such file or folder")
    if args.vocab_size < 256:
        parser.error("--vocab-size must be at least 256, one for each byte")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
