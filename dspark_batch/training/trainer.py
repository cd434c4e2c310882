"""The training loop: AdamW, warm-up and cosine, clipping, EMA, checkpoints that resume exactly.

Everything random is derived from the seed and the step, so a run by steps that was killed and
resumed ends with the weights of one that was not: bit by bit on one thread, to rounding on several.
The folder holds `state.pt` (resume), `log.jsonl` (one JSON object per line) and `export/` (the best
draft so far by greedy τ, deployable at any time).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_batch.engine import replacing
from dspark_batch.job import duration
from dspark_batch.training.anchors import AnchorBatch, anchor_batch, repeated, sample_anchors
from dspark_batch.training.checkpoint import save_draft
from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.evaluation import Evaluation, evaluate
from dspark_batch.training.features import FeatureBatch, FeatureSource
from dspark_batch.training.fused_loss import TargetRows, fused_loss
from dspark_batch.training.losses import LossTerms
from dspark_batch.training.options import TrainingOptions, learning_rate_at

logger = logging.getLogger(__name__)

POOL_BATCHES = 16
"""Batches are cut from pools of this many, sorted by length inside a pool: little padding."""


@dataclass(slots=True)
class TrainState:
    """How far a training is; the trainer counts, a progress display reads."""

    progress: float = 0.0
    step: int = 0
    seconds_left: float | None = None
    """Wall clock, by the pace of this process, capturing and evaluating included."""
    capture: float | None = None
    """Share of a chunk that is captured, while one is."""
    loss: float | None = None
    tau: float | None = None
    """Greedy, on the held-out responses, when they were last measured."""
    best_tau: float = 0.0
    num_rows: int = 1000
    """Of the display's bar, which then moves by thousandths."""

    @property
    def num_done(self) -> int:
        """Thousandths that are done."""
        return round(self.num_rows * self.progress)

    def text(self) -> str:
        """Share, time left, step, loss, accepted length."""
        parts = [f"{self.progress:.1%}"]
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        parts.append(f"step {self.step:,}")
        if self.capture is not None:
            parts.append(f"capturing features {self.capture:.0%}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.tau is not None:
            parts.append(f"accepted length {self.tau:.2f}, best {self.best_tau:.2f}")
        return ", ".join(parts)


class Trainer:
    """Trains `draft` in place; `run` continues from the folder's checkpoint if there is one.

    Invariant between steps: `epoch`, `chunk` and `place` name the next batch, `step` counts those
    taken.
    """

    def __init__(
        self,
        draft: DSparkDraft,
        source: FeatureSource,
        *,
        options: TrainingOptions,
        folder: Path,
        held_out: FeatureSource | None = None,
        report: Callable[[TrainState], None] = lambda _: None,
    ) -> None:
        self.draft, self.source, self.held_out = draft, source, held_out
        self.options, self.folder = options, folder
        self.parameters = dict(draft.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=0.0, fused=True
        )
        self._hidden_packed: Callable[[Tensor, Tensor, Tensor], Tensor] = draft.hidden_packed
        if options.compile:
            self._hidden_packed = torch.compile(draft.hidden_packed, dynamic=True)
        self.device = draft.fc.weight.device
        self.step = self.epoch = self.chunk = self.place = 0
        self.best_tau = 0.0
        self._report = report
        self._state = TrainState()
        self._begun = (time.monotonic(), 0.0)  # this process, and the progress it began with
        self.seconds = 0.0  # spent in steps, earlier processes included
        self._last_checkpoint = self._last_evaluation = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 1 at its end."""
        if self.options.num_steps is not None:
            return min(1.0, self.step / self.options.num_steps)
        assert self.options.seconds is not None
        return min(1.0, self.seconds / self.options.seconds)

    def run(
        self, *, stop_at: int | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Train to the end, evaluating and saving on the way.

        Ends early, to be resumed, at step `stop_at` or when `stopped` becomes true.
        """
        self.resume()
        self._last_evaluation = self._last_checkpoint = time.monotonic()
        self._begun = (time.monotonic(), self.progress)
        if self.step == 0 and self.held_out is not None:
            self.evaluate_and_export()

        def running() -> bool:
            if stopped() or (stop_at is not None and self.step >= stop_at):
                return False
            return self.progress < 1.0

        while running():
            for batch in self._epoch(running):
                terms, norm = self.train_step(batch)
                if self.step % self.options.log_every == 0:
                    self._log_step(terms, norm)
                self._state.loss = float(terms.total.detach())
                self._tell()
                self._when_due()
        if self.progress >= 1.0:
            self.evaluate_and_export()
        self.save_state()

    def _tell(self) -> None:
        state, gained = self._state, self.progress - self._begun[1]
        state.progress, state.step = self.progress, self.step
        if gained > 0:
            passed = time.monotonic() - self._begun[0]
            state.seconds_left = passed / gained * (1.0 - state.progress)
        self._report(state)

    def train_step(self, batch: FeatureBatch) -> tuple[LossTerms, Tensor]:
        """One optimiser step on one batch; the loss terms and the gradient norm before clipping."""
        begin = time.monotonic()
        options, draft = self.options, self.draft
        rate = learning_rate_at(self.progress, options)
        seed = options.seed * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        weights = None
        if options.lookup_weight < 1.0:
            weights = torch.where(repeated(batch.token_ids), options.lookup_weight, 1.0)
        anchors = sample_anchors(batch.loss_mask, options.num_anchors, generator, weights=weights)
        blocks = anchor_batch(batch, anchors, draft.config.block_size).to(self.device)
        batch = batch.to(self.device)
        draft.train()
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=options.bf16),
        ):
            torch.manual_seed(seed)  # of the dropout
            hidden = self._hidden_packed(batch.features, blocks.previous[..., 0], blocks.anchors)
            terms = self._loss(hidden, batch, blocks)
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), options.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self._update_average()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or only the launches would be timed
        self.seconds += time.monotonic() - begin
        return terms, norm

    def _loss(self, hidden: Tensor, batch: FeatureBatch, blocks: AnchorBatch) -> LossTerms:
        """The loss of the slots that count in blocks with hidden rows `[b, A, γ, d]`."""
        draft, (rows, columns, slots) = self.draft, blocks.mask.nonzero(as_tuple=True)
        chosen = (rows, columns, slots)
        positions = blocks.anchors[rows, columns] + slots
        embedded = markov = markov_w2 = None
        if draft.markov_head is not None:
            embedded = draft.markov_head.embed(blocks.previous)
            markov = draft.markov_head.rows(embedded, hidden)[chosen]
            markov_w2 = draft.markov_head.markov_w2.weight
        confidence = draft.confidence(hidden, embedded)
        return fused_loss(
            hidden[chosen],
            markov,
            markov_w2=markov_w2,
            head=draft.head_weight,
            target=TargetRows(
                batch.last_hidden[rows, positions],
                batch.log_normalizer[rows, positions],
                draft.draft_ids[blocks.labels[chosen]],
                self.source.target.logit_cap,
            ),
            confidence_logits=None if confidence is None else confidence[chosen],
            slots=slots,
            weights=self.options.loss,
            dtype=torch.bfloat16 if self.options.bf16 else torch.float32,
        )

    def _update_average(self) -> None:
        decay = self.options.ema_decay
        if decay is None:
            return
        # Shorter memory at the start, so that the initial weights do not linger.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.parameters.values()), 1 - decay
            )

    def chunks(self, epoch: int) -> list[list[int]]:
        """Sequence indices of every chunk of an epoch, a function of seed and epoch alone."""
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        return self.source.chunks(torch.randperm(len(self.source), generator=generator).tolist())

    def batches(self, chunk: list[int], epoch: int) -> list[list[int]]:
        """Sequence indices of every batch of a chunk, pass by pass; functions of their arguments
        and the seed.
        """
        size, sequences = self.options.batch_size, self.source.sequences
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        passes = []
        for _ in range(self.options.num_passes):
            order = [chunk[i] for i in torch.randperm(len(chunk), generator=generator).tolist()]
            batches = []
            for start in range(0, len(order), size * POOL_BATCHES):
                pool = order[start : start + size * POOL_BATCHES]
                pool.sort(key=lambda index: len(sequences[index].token_ids))
                batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            passes += [batches[i] for i in shuffled]
        return passes

    def _epoch(self, running: Callable[[], bool]) -> Iterator[FeatureBatch]:
        chunks = self.chunks(self.epoch)
        while self.chunk < len(chunks):
            batches = self.batches(chunks[self.chunk], self.epoch)
            if not self._hold(chunks[self.chunk], running):
                return
            while self.place < len(batches) and running():
                self.place += 1
                yield self.source.batch(batches[self.place - 1])
            if self.place < len(batches):
                return
            self.chunk, self.place = self.chunk + 1, 0
        self.epoch, self.chunk = self.epoch + 1, 0

    def _hold(self, chunk: list[int], running: Callable[[], bool]) -> bool:
        """Capture a chunk and say how far that is; false where it was given up."""
        before = self.source.num_captured
        total = sum(len(self.source.sequences[index].token_ids) for index in chunk)

        def telling() -> bool:
            self._state.capture = (self.source.num_captured - before) / total
            self._tell()
            return running()

        held = self.source.hold(chunk, running=telling)
        self._state.capture = None
        return held

    def _when_due(self) -> None:
        now = time.monotonic()
        if now - self._last_evaluation >= self.options.evaluate_seconds:
            self.evaluate_and_export()
            self._last_evaluation = time.monotonic()
        if now - self._last_checkpoint >= self.options.checkpoint_seconds:
            self.save_state()
            self._last_checkpoint = time.monotonic()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The draft with its averaged weights, where an average is kept."""
        if self.options.ema_decay is None:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._load(self.average)
        try:
            yield
        finally:
            self._load(kept)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def evaluate_and_export(self) -> Evaluation | None:
        """Measure on the held-out set; export if it is the best greedy τ so far (or unmeasured)."""
        with self.averaged():
            if self.held_out is None:
                save_draft(self.draft, self.folder / "export")
                return None
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16):
                result = evaluate(self.draft, self.held_out, seed=self.options.seed)
            if result.tau_greedy > self.best_tau:
                self.best_tau = result.tau_greedy
                save_draft(self.draft, self.folder / "export")
        self._state.tau, self._state.best_tau = result.tau_greedy, self.best_tau
        self._tell()
        self._log({"event": "evaluation", **asdict(result), "best_tau_greedy": self.best_tau})
        return result

    def save_state(self) -> None:
        """Write `state.pt`; it appears whole or not at all."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "epoch": self.epoch,
            "chunk": self.chunk,
            "place": self.place,
            "best_tau": self.best_tau,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average if self.options.ema_decay is not None else {},
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.folder / "state.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Take up `state.pt` if it exists."""
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.step, self.epoch = state["step"], state["epoch"]
        self.chunk, self.place = state["chunk"], state["place"]
        self.best_tau, self.seconds = state["best_tau"], state["seconds"]
        self._load(state["parameters"])
        if state["average"]:
            self.average = {name: t.to(self.device) for name, t in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        logger.info("resumed %s at step %d", path, self.step)

    def _log_step(self, terms: LossTerms, norm: Tensor) -> None:
        self._log(
            {
                "event": "step",
                "epoch": self.epoch,
                "loss": float(terms.total.detach()),
                "cross_entropy": float(terms.cross_entropy.detach()),
                "l1": float(terms.l1.detach()),
                "lk": float(terms.lk.detach()),
                "confidence": float(terms.confidence.detach()),
                "grad_norm": float(norm),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "held_bytes": self.source.num_held_bytes,
            }
        )

    def _log(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **entry})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        logger.info("%s", line)
