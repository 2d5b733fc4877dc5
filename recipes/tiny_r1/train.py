"""Train the tiny reasoning model: `python -m recipes.tiny_r1.train --out DIR`. One H100, at most a quarter of an hour; README.md has the figures.

A run is a fixed number of steps; `--minutes` only says when to stop for now, and the same command goes on from the checkpoint. Everything is drawn
from the seed and the step's number, so a run in slices gives what a run at once gives.

DIR gets: checkpoint.pt, tokenizer.json, log.jsonl (a line every few steps), and model.safetensors with shape.json once all steps are done.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from recipes.tiny_r1.data import LEARNT, Batch, Packing, batches, corpus
from recipes.tiny_r1.evaluate import evaluate
from recipes.tiny_r1.fake_quant import q4_k_weights
from recipes.tiny_r1.model import Load, TinyR1
from recipes.tiny_r1.optimizer import balance, learning_rate, optimizers
from recipes.tiny_r1.shape import Shape
from recipes.tiny_r1.tokenizer import BOS_ID, save_tokenizer, train_tokenizer

_BIAS_SPEED, _BALANCE_WEIGHT = 1e-3, 1e-4  # V3's gamma and alpha
_CORPUS = 12_000  # texts that the tokenizer is trained on


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is; part of its checkpoint."""

    steps: int = 8700
    rows: int = 128
    length: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.05
    mtp_weight: float = 0.3
    quantised_share: float = 0.1  # of the steps, the last ones, that see Q4_K weights
    seed: int = 0
    kernel: str = "grouped"


_DEFAULT = Settings()


class Run:
    """A model in training, and everything that a checkpoint holds."""

    def __init__(self, settings: Settings, shape: Shape, tokenizer: str, device: torch.device) -> None:
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.step = 0
        torch.manual_seed(settings.seed)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = TinyR1(shape, dtype=dtype, kernel=settings.kernel).to(device)
        self.optimizers = optimizers(self.model, settings.lr, settings.weight_decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. No state of a random generator: after the first step none is drawn from."""
        return {
            "step": self.step,
            "settings": asdict(self.settings),
            "shape": asdict(self.model.shape),
            "tokenizer": self.tokenizer,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @staticmethod
    def restored(state: dict[str, Any], device: torch.device) -> Run:
        """The run that `state` was taken from."""
        run = Run(Settings(**state["settings"]), Shape(**state["shape"]), state["tokenizer"], device)
        run.step = state["step"]
        run.model.load_state_dict(state["model"])
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return run

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Returns what is worth logging, as tensors, so that nothing waits for the GPU."""
        settings = self.settings
        rate = learning_rate(self.step, settings.steps, settings.lr)
        with q4_k_weights(self.model, self.step >= settings.steps * (1 - settings.quantised_share)):
            loss, mtp, loads = self._losses(torch.from_numpy(batch.astype("int64")).to(self.device, non_blocking=True))
            balances = torch.stack([load.balance for load in loads])
            torch.autograd.backward(loss + settings.mtp_weight * mtp + _BALANCE_WEIGHT * balances.sum())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        balance(self.model.gates(), loads, _BIAS_SPEED)
        self.step += 1
        busiest = torch.stack([load.counts.max() / load.counts.mean() for load in loads])
        return {"loss": loss.detach(), "mtp_loss": mtp.detach(), "busiest_expert": busiest.max()}

    def _losses(self, marked: Tensor) -> tuple[Tensor, Tensor, list[Load]]:
        """The loss of the next token, that of the token after it (on half of the rows, to save time), and the experts' loads."""
        tokens, learnt = marked & (LEARNT - 1), marked >= LEARNT
        mask = text_mask(tokens)
        hidden, loads = self.model(tokens, mask)
        loss = next_loss(self.model.logits(hidden), tokens, learnt, 1)
        half = len(tokens) // 2
        further, load = self.model.predict_further(hidden[:half], tokens[:half], mask[:half])
        assert load is not None
        return loss, next_loss(self.model.logits(further), tokens[:half], learnt[:half], 2), [*loads, load]


def text_mask(tokens: Tensor) -> Tensor:
    """Each token sees those before it in its own text: bool [B, 1, T, T] for tokens [B, T]."""
    text = (tokens == BOS_ID).cumsum(1)
    same = text[:, :, None] == text[:, None, :]
    return (same & torch.ones_like(same[0]).tril())[:, None]


def next_loss(logits: Tensor, tokens: Tensor, learnt: Tensor, ahead: int) -> Tensor:
    """Mean cross-entropy of the tokens `ahead` places on, of those to be learnt. Texts start with tokens that are not, so none looks across."""
    targets = tokens.where(learnt, -100).roll(-ahead, 1)
    targets[:, -ahead:] = -100
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def main() -> None:
    """The command."""
    started = time.monotonic()
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run = _restore_or_start(options)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the memory-efficient kernel takes masks and unequal heads
    if options.compile:
        for block in (*run.model.layers, run.model.mtp.block):
            block.compile(dynamic=False)
    _train(run, options, started + 60 * options.minutes)
    _save(run.state(), options.out / "checkpoint.pt")
    _judge(run, options.questions, options.out)
    if run.step == run.settings.steps:
        _finish(run, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the tiny reasoning model.")
    parser.add_argument("--out", type=Path, required=True, help="where everything is written; a checkpoint found there is continued")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop for now after so many minutes, the final measure excluded")
    parser.add_argument("--steps", type=int, default=_DEFAULT.steps, help="steps of the whole run (a new run only)")
    parser.add_argument("--rows", type=int, default=_DEFAULT.rows, help="rows of a step (a new run only)")
    parser.add_argument("--lr", type=float, default=_DEFAULT.lr, help="peak learning rate (a new run only)")
    parser.add_argument("--seed", type=int, default=_DEFAULT.seed, help="of weights and data (a new run only)")
    parser.add_argument("--experts", choices=("grouped", "dense"), default=_DEFAULT.kernel, help="how experts are computed (a new run only)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes that make data")
    parser.add_argument("--questions", type=int, default=30, help="held-out questions of each skill and language asked in the end; 0: none")
    parser.add_argument("--log_every", type=int, default=20, help="steps between lines of the log")
    return parser


def _restore_or_start(options: argparse.Namespace) -> Run:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists():
        return Run.restored(torch.load(checkpoint, map_location=device), device)
    shape = Shape()
    tokenizer = train_tokenizer(corpus(options.seed, _CORPUS), shape.vocab)
    save_tokenizer(tokenizer, options.out)
    settings = Settings(steps=options.steps, rows=options.rows, lr=options.lr, seed=options.seed, kernel=options.experts)
    return Run(settings, shape, tokenizer.to_str(), device)


def _train(run: Run, options: argparse.Namespace, deadline: float) -> None:
    settings = run.settings
    data = batches(Packing(run.tokenizer, settings.seed, settings.rows, settings.length), run.step, options.workers)
    since, tokens = time.monotonic(), settings.rows * settings.length * options.log_every
    with open(options.out / "log.jsonl", "a", encoding="utf-8") as log:
        while run.step < settings.steps and time.monotonic() < deadline:
            figures = run.train_step(next(data))
            if run.step % options.log_every and run.step != settings.steps:
                continue
            line = {"step": run.step, **{name: round(value.item(), 4) for name, value in figures.items()}}
            now = time.monotonic()
            line |= {"lr": round(learning_rate(run.step, settings.steps, settings.lr), 6), "tokens_per_second": round(tokens / (now - since))}
            since = now
            print(json.dumps(line), file=log, flush=True)
            print(json.dumps(line), flush=True)


def _judge(run: Run, each: int, out: Path) -> None:
    """Ask held-out questions with forced thinking and without; the compiled model would compile anew for each length, so a plain one replies."""
    if not each:
        return
    model = TinyR1(run.model.shape, dtype=run.model.dtype).to(run.device)
    model.load_state_dict(run.model.state_dict())
    for force_think in (True, False):
        result = evaluate(model, Tokenizer.from_str(run.tokenizer), each, force_think=force_think)
        print(f"step {run.step}, {'forced' if force_think else 'free'} thinking, {each} questions each\n{result.table()}", flush=True)
        report = [{"prompt": question.prompt, "answer": question.answer, "reply": reply} for question, reply in result.wrong]
        (out / f"wrong-{'forced' if force_think else 'free'}.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def _finish(run: Run, out: Path) -> None:
    """The weights as they are published: bfloat16, routers' biases float32."""
    exact = {"e_score_correction_bias"}
    state = {name: value if name.rpartition(".")[2] in exact else value.bfloat16() for name, value in run.model.state_dict().items()}
    save_file({name: value.contiguous().cpu() for name, value in state.items()}, out / "model.safetensors")
    (out / "shape.json").write_text(json.dumps(asdict(run.model.shape), indent=2) + "\n", encoding="utf-8")


def _save(state: dict[str, Any], path: Path) -> None:
    """A checkpoint is there whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
