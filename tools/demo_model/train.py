"""Training: a plan of stages from short windows to full ones, one learning-rate curve over all.

`python -m tools.demo_model.train --bank BANK --run FOLDER` writes `FOLDER/checkpoint.pt` (the
averaged weights, for export) and `FOLDER/state.pt`, from which the same command goes on.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn import functional

from tools.demo_model import bank
from tools.demo_model.model import DemoModel, Shape, load, save
from tools.demo_model.vocabulary import TokenIds
from tools.demo_model.windows import PROMPT_TOKENS, Batch, Settings, WindowMaker, collate

TOKENIZER = Path("worker/demo_model/tokenizer.json")
_CTC_WEIGHT = 0.4
_GUIDE_WEIGHT = 0.4
_SAVE_MINUTES = 2.0


@dataclass(frozen=True)
class Stage:
    """Windows of one size; their content grows from one length to another during the stage."""

    minutes: float
    window_seconds: int
    batch: int
    first_content_seconds: float
    last_content_seconds: float
    short_share: float = 0.0
    """Batches of 10 s and 15 s windows among them, so that short clips are not forgotten."""
    prompt_share: float = 0.15
    """Batches that begin with text from before the window."""

    def settings(self, progress: float) -> Settings:
        growth = self.last_content_seconds - self.first_content_seconds
        content = self.first_content_seconds + growth * min(1.0, progress * 1.25)
        return Settings(
            frames=self.window_seconds * bank.FRAMES_PER_SECOND,
            longest_content=int(content * bank.FRAMES_PER_SECOND),
        )


PLAN = (
    Stage(10, 10, 16, 6, 10),
    Stage(10, 20, 10, 10, 20, prompt_share=0.3),
    Stage(46, 30, 8, 20, 30, short_share=0.1, prompt_share=0.65),
)


GOING_ON = (Stage(100, 30, 8, 30, 30, short_share=0.3, prompt_share=0.6),)
"""For a model that has been through `PLAN`."""


@dataclass(frozen=True)
class Losses:
    text: Tensor
    ctc: Tensor
    guide: Tensor
    accuracy: Tensor

    @property
    def total(self) -> Tensor:
        return self.text + _CTC_WEIGHT * self.ctc + _GUIDE_WEIGHT * self.guide


def _inside(spans: Tensor, frames: int, margin: float) -> Tensor:
    """[rows, frames]: which encoder frames lie within each (start, end) span."""
    at = torch.arange(frames)
    return (at >= spans[:, :1] - margin) & (at <= spans[:, 1:] + margin)


def guide_loss(attentions: list[Tensor], batch: Batch) -> Tensor:
    """Teaches heads where to look, without which full windows are not learnt.

    A head in each of the first two layers finds the word just said, those of the last two the
    word to say; the last layer's first head spreads over all of it, for the word timestamps.
    """
    frames = attentions[0].shape[-1]
    mass, spread = [], []
    for layer, heads, spans in (
        (-4, (1,), batch.token_spans),
        (-3, (0,), batch.token_spans),
        (-2, (0,), batch.target_spans),
        (-1, (0, 1), batch.target_spans),
    ):
        rows = spans[..., 0] >= 0
        within = _inside(spans[rows], frames, margin=2.0)
        for head in heads:
            log_weights = attentions[layer][:, head][rows]
            if layer == -1 and head == 0:
                exact = _inside(spans[rows], frames, margin=0.5)
                spread.append(-(log_weights * exact).sum(-1) / exact.sum(-1).clamp(min=1))
            else:
                mass.append(-log_weights.masked_fill(~within, -1e4).logsumexp(-1).clamp(min=-20))
    return torch.stack([loss.mean() for loss in mass]).sum() + 0.3 * spread[0].mean()


def losses(model: DemoModel, batch: Batch, unused_tokens: int) -> Losses:
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        sound = model.encoder(batch.mel, batch.first_positions)
        hidden, attentions = model.decoder(batch.tokens, sound)
        rows = batch.targets != -100
        logits = model.logits(hidden[rows], unused_tokens)
        ctc = model.ctc_logits(sound).log_softmax(-1)
    targets = batch.targets[rows]
    text_lengths = torch.tensor([len(text) for text in batch.text])
    ctc_loss = functional.ctc_loss(
        ctc.transpose(0, 1),
        torch.tensor([token for text in batch.text for token in text]),
        torch.full_like(text_lengths, ctc.shape[1]),
        text_lengths,
        blank=model.shape.tokens - 1,
        zero_infinity=True,
    )
    return Losses(
        functional.cross_entropy(logits, targets),
        ctc_loss,
        guide_loss(attentions, batch),
        (logits.argmax(-1) == targets).float().mean(),
    )


class Trainer:
    """Model, its running average, optimizers and where in the plan they are."""

    def __init__(self, model: DemoModel, rate: float) -> None:
        self.model = model
        self.average = {name: value.clone() for name, value in model.state_dict().items()}
        matrices = [
            value
            for name, value in model.named_parameters()
            if "layers" in name and value.dim() == 2
        ]
        chosen = {id(value) for value in matrices}
        others = [value for value in model.parameters() if id(value) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.rate = rate
        self.steps = 0
        self.minutes = 0.0

    def set_rate(self, total_minutes: float) -> float:
        """Warms up for 100 steps, holds for 40 % of the time, then falls to 1 % as a cosine."""
        fall = max(0.0, self.minutes / total_minutes - 0.4) / 0.6
        factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))
        rate = self.rate * factor * min(1.0, (self.steps + 1) / 100)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def step(self, batch: Batch, unused_tokens: int) -> Losses:
        found = losses(self.model, batch, unused_tokens)
        self.model.zero_grad()
        found.total.backward()
        if distributed.is_initialized():
            self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        decay = min(0.99, (self.steps + 1) / (self.steps + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return found

    def _share_gradients(self) -> None:
        """Averages the gradients, and the clock, over all processes."""
        gradients = [value.grad for value in self.model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        clock = torch.tensor([self.minutes])
        shared = torch.cat([flat, clock])
        distributed.all_reduce(shared)
        shared /= distributed.get_world_size()
        self.minutes = float(shared[-1])
        at = 0
        for gradient in gradients:
            gradient.copy_(shared[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()

    def save(self, folder: Path) -> None:
        averaged = DemoModel(self.model.shape)
        averaged.load_state_dict(self.average)
        save(averaged, folder / "checkpoint.pt")
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps": self.steps,
            "minutes": self.minutes,
        }
        torch.save(state, folder / "state.partial")
        (folder / "state.partial").replace(folder / "state.pt")

    def resume(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.minutes = state["steps"], state["minutes"]


def _stage_at(plan: tuple[Stage, ...], minutes: float) -> tuple[Stage, float]:
    """The stage that holds that minute of the plan, and how far it has come (0 to 1)."""
    for stage in plan:
        if minutes < stage.minutes:
            return stage, minutes / stage.minutes
        minutes -= stage.minutes
    return plan[-1], 1.0


def compact_ids(ids: TokenIds) -> Tensor:
    """Maps Whisper's ids to compact ones; ids without training share the last."""
    compact = torch.full((ids.size,), len(ids.used))
    compact[torch.tensor(ids.used)] = torch.arange(len(ids.used))
    return compact


def train(
    trainer: Trainer,
    maker: WindowMaker,
    ids: TokenIds,
    folder: Path,
    plan: tuple[Stage, ...],
    rank: int,
    processes: int,
) -> None:
    """Trains until the plan's time is over; process 0 reports and saves every few minutes."""
    compact = compact_ids(ids)
    unused_tokens = ids.size - len(ids.used)
    total = sum(stage.minutes for stage in plan)
    choice = random.Random(trainer.steps)  # the same in every process
    chance = random.Random(f"{rank} {trainer.steps}")
    seen: list[tuple[float, ...]] = []
    last_save = trainer.minutes
    while trainer.minutes < total:
        started = time.monotonic()
        stage, progress = _stage_at(plan, trainer.minutes)
        settings, count = stage.settings(progress), stage.batch
        if choice.random() < stage.short_share:
            frames, count = choice.choice([(1000, 16), (1500, 12)])
            settings = Settings(frames=frames, longest_content=frames)
        prompt_tokens = 0
        if choice.random() < stage.prompt_share:
            prompt_tokens = choice.choice([PROMPT_TOKENS, choice.randint(1, PROMPT_TOKENS)])
        count = max(1, count // processes)
        windows = [maker.draw(chance, settings, prompt_tokens) for _ in range(count)]
        rate = trainer.set_rate(total)
        found = trainer.step(collate(windows, compact), unused_tokens)
        if not torch.isfinite(found.total):
            raise FloatingPointError(f"the loss is {found.total.item()} at step {trainer.steps}")
        seen.append(tuple(x.item() for x in (found.text, found.accuracy, found.ctc, found.guide)))
        trainer.minutes += (time.monotonic() - started) / 60
        if rank > 0:
            continue
        if trainer.steps % 50 == 0:
            text, accuracy, ctc, guide = (
                sum(values) / len(seen) for values in zip(*seen, strict=True)
            )
            print(
                f"{trainer.minutes:5.1f} min step {trainer.steps} of {stage.window_seconds} s: "
                f"text {text:.3f} right {accuracy:.3f} ctc {ctc:.3f} guide {guide:.3f} "
                f"rate {rate:.5f}",
                flush=True,
            )
            seen = []
        if trainer.minutes - last_save > _SAVE_MINUTES:
            trainer.save(folder)
            last_save = trainer.minutes
    if rank == 0:
        trainer.save(folder)


def _run(rank: int, options: argparse.Namespace) -> None:
    """One process of the training; each takes its share of every batch on one core."""
    torch.set_num_threads(1)
    meeting = f"file://{(options.run / 'meeting').absolute()}"
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=options.processes)
    ids = TokenIds(TOKENIZER)
    torch.manual_seed(0)
    model = load(options.start) if options.start else DemoModel(Shape(tokens=len(ids.used) + 1))
    trainer = Trainer(model, options.rate)
    if (options.run / "state.pt").exists():
        trainer.resume(options.run)
    phrases, talks = bank.load_phrases(options.bank), bank.load_talks(options.bank)
    stages = GOING_ON if options.go_on else PLAN
    plan = tuple(replace(stage, minutes=stage.minutes * options.scale) for stage in stages)
    maker = WindowMaker(phrases, talks, bank.load_noises(options.bank), ids)
    train(trainer, maker, ids, options.run, plan, rank, options.processes)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with")
    parser.add_argument("--go-on", action="store_true", help="full windows from the beginning")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--scale", type=float, default=1.0, help="of every stage's minutes")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    (options.run / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_run, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
