"""From a recipe to an engine folder, which appears whole or not at all.

| step | what it does | what it ensures |
|---|---|---|
| open | weights of target and draft | both can be read, and fit each other |
| read | example texts through an independent forward pass | there is something to check against |
| build | target.onnx, draft.onnx, tokenizer | every weight is in a file, once |
| check | the graphs against the forward pass | logits, taps, invariance, blocks |
| measure | calibration, cost table | the scheduler knows this machine |
| compile | target.plan, draft.plan (TensorRT) | one plugin, the sizes that a run needs |
| install | manifest, rename | `run` finds a complete engine |

With TensorRT-RTX no step needs a GPU: graphs for TensorRT are checked and calibrated with ONNX
Runtime. It has no bf16 kernels, so bf16 graphs are checked as twins that compute in fp32. Costs of
engines for GPUs are measured on their first run; those for captured steps are checked and
calibrated on twins of their graphs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch import __version__
from dspark_batch.drafters import (
    DRAFTERS,
    LOOKUPS,
    DraftSpec,
    LookupInfo,
    ReferenceDraft,
    check_fits,
    check_paged_draft,
    draft_graph,
    draft_spec,
    draft_vocab,
    embedding,
    head,
    narrow_spec,
    tables,
)
from dspark_batch.engine import (
    COSTS_FILE,
    ENGINE_FILES,
    FILE_NAME,
    FORMAT,
    CacheInfo,
    DraftInfo,
    EngineManifest,
    Limits,
    PlansInfo,
    TargetInfo,
    Tokenizer,
    check_replaceable,
    describe_file,
    ensure_costs,
    installed_versions,
    open_engine,
    read_manifest,
    replace_folder,
    write_tokenizer,
)
from dspark_batch.engine.runtimes import RUNTIMES, Placement, runtime_module
from dspark_batch.errors import EngineError
from dspark_batch.export.calibrate import calibrate
from dspark_batch.export.check import Texts, check_all_used, check_draft, check_target
from dspark_batch.export.recipe import NO_DRAFT, DraftSection, Recipe, load_recipe
from dspark_batch.export.texts import check_rows, example_prompts
from dspark_batch.export.trt_plans import build_plan_files, check_gpus, plan_files_info
from dspark_batch.models import (
    DecoderGraph,
    Outliers,
    PagedDecoderGraph,
    Smoothing,
    check_paged,
)
from dspark_batch.models.families import decoder_spec
from dspark_batch.models.graph import PRECISIONS, GraphBuilder, StoredWeight, in_fp32
from dspark_batch.models.weights import Weights, open_weights, sha256_of

Progress = Callable[[str], None]
_LEAST_POSITIONS = 512


def export(
    recipe_path: Path,
    *,
    output: Path,
    force: bool = False,
    runtime: str | None = None,
    precision: str | None = None,
    gpu_archs: Sequence[int] = (),
    progress: Progress = lambda _: None,
) -> Path:
    """Build the engine of a recipe in `output` and return that folder.

    An engine of the same recipe and sources is kept, unless `force`. `runtime`, `precision` and
    `gpu_archs` win over the recipe.

    Raises:
        UsageError: the recipe is wrong.
        EngineError: the sources are missing, do not fit each other, or the check fails.
    """
    recipe = load_recipe(str(recipe_path)).with_engine(
        runtime=runtime, precision=precision, gpu_archs=tuple(gpu_archs)
    )
    return build(recipe, output=output, force=force, progress=progress)


def build(
    recipe: Recipe,
    *,
    output: Path,
    force: bool = False,
    progress: Progress = lambda _: None,
    context_layer_ids: Sequence[int] = (),
) -> Path:
    """As `export`, for a recipe at hand.

    Without a draft, the target's context is the outputs of `context_layer_ids`: what a draft is
    trained on.
    """
    check_gpus(recipe.engine, progress=progress)
    runtime_module("onnxruntime")  # what every graph is checked with, whatever it is for
    progress("opening weights")
    with open_weights(recipe.target_source) as target:
        if recipe.draft_source is None:
            plain = _Export(recipe, target, None, output, progress, tuple(context_layer_ids))
            return plain.run(force=force)
        with open_weights(recipe.draft_source) as draft:
            return _Export(recipe, target, draft, output, progress).run(force=force)


class _Export:
    """One export; the steps in their order."""

    def __init__(
        self,
        recipe: Recipe,
        target: Weights,
        draft: Weights | None,
        output: Path,
        progress: Progress,
        context_layer_ids: tuple[int, ...] = (),
    ) -> None:
        self._recipe, self._target, self._draft = recipe, target, draft
        self._output, self._progress = output, progress
        self._context_layer_ids = context_layer_ids
        self._spec = decoder_spec(target.config)
        if self._paged:
            check_paged(self._spec)
        self._draft_spec: DraftSpec | None = None
        self._draft_vocab: NDArray[np.int64] | None = None
        if draft is not None:
            assert recipe.draft is not None
            if recipe.draft.drafter not in DRAFTERS:
                known = ", ".join([*DRAFTERS, *LOOKUPS, NO_DRAFT])
                raise EngineError(
                    f"{recipe.path}: [draft] drafter = {recipe.draft.drafter!r} is not known",
                    hint=f"known: {known}",
                )
            self._draft_spec = draft_spec(draft)
            check_fits(self._draft_spec, draft, self._spec)
            if self._paged:
                check_paged_draft(self._draft_spec)
            self._draft_vocab = draft_vocab(draft, self._draft_spec)
        self._plans = plan_files_info(recipe.engine, block_size=self._block_size)

    def run(self, *, force: bool) -> Path:
        """Every step; the folder is renamed into place at the end."""
        self._progress("hashing weights")
        self._target_info = self._describe_target()
        self._draft_info = self._describe_draft()
        if not force and self._is_built():
            self._progress(f"{self._output} is already built from this recipe")
            return self._output
        check_replaceable(self._output, ENGINE_FILES, mark=FILE_NAME)  # before minutes of work
        scratch = self._output.with_name(f".{self._output.name}.{os.getpid()}")
        scratch.mkdir(parents=True)
        try:
            self._build(scratch)
            with self._runnable(scratch) as graphs:
                parity = self._check(graphs)
                if self._draft_info is not None:
                    self._measure(graphs, parity)
            if self._plans is not None:
                self._build_plans(scratch, self._plans)
            self._write_manifest(scratch, parity)
            self._progress("installing")
            replace_folder(self._output, scratch, ENGINE_FILES, mark=FILE_NAME)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return self._output

    def _is_built(self) -> bool:
        try:
            there = read_manifest(self._output)
        except EngineError:
            return False
        same_draft = _origin(there.draft) == _origin(self._draft_info)
        return (
            same_draft
            and there.target == self._target_info
            and there.runtime == self._recipe.engine.runtime
            and there.precision == self._recipe.engine.precision
            and there.plans == self._plans
            and there.limits == self._limits
            and there.versions == self._versions
        )

    @property
    def _paged(self) -> bool:
        """Whether the graphs are for captured steps."""
        return RUNTIMES[self._recipe.engine.runtime].paged

    @property
    def _taps(self) -> tuple[int, ...]:
        return self._draft_spec.taps if self._draft_spec else self._context_layer_ids

    @property
    def _block_size(self) -> int:
        if self._draft_spec is not None:
            return self._draft_spec.block_size
        return self._recipe.draft.block_size if self._recipe.draft else 0

    @property
    def _versions(self) -> dict[str, str]:
        packages = ["numpy", "onnx", "onnxruntime", *(["triton"] if self._plans else [])]
        return {"dspark-batch": __version__, **installed_versions(packages)}

    @property
    def _limits(self) -> Limits:
        engine = self._recipe.engine
        return Limits(max_rows=engine.max_rows, max_tokens=engine.max_tokens)

    def _describe_target(self) -> TargetInfo:
        spec = self._spec
        return TargetInfo(
            family=spec.family,
            source=self._recipe.target.weights,
            license=self._recipe.target.license,
            files={path.name: sha256_of(path) for path in self._target.files},
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            cache=CacheInfo.from_shapes(spec.cache_shapes),
            stop_token_ids=self._target.stop_token_ids,
            context_layer_ids=self._context_layer_ids,
        )

    def _describe_draft(self) -> DraftInfo | None:
        spec, weights, section = self._draft_spec, self._draft, self._recipe.draft
        if section is None:
            return None
        if spec is None or weights is None:
            return _lookup_alone(section)
        assert self._draft_vocab is not None
        return DraftInfo(
            drafter=section.drafter,
            source=section.weights,
            lookup=_lookup_info(section, spec.block_size),
            files={path.name: sha256_of(path) for path in weights.files},
            block_size=spec.block_size,
            mask_token_id=spec.mask_token_id,
            vocab_size=len(self._draft_vocab),
            target_layer_ids=spec.taps,
            markov_head=spec.markov_head,
            markov_rank=spec.markov_rank,
            cache=CacheInfo.from_shapes(((spec.num_kv_heads, spec.head_dim),) * spec.num_layers),
            confidence_temperatures=(1.0,) * spec.block_size,
            acceptance=(0.5,) * spec.block_size,
        )

    def _build(self, folder: Path) -> None:
        engine = self._recipe.engine
        write_tokenizer(self._target, folder)
        smoothing = self._read_texts(folder)
        self._progress(f"building target.onnx ({self._spec.family}, {engine.precision})")
        builder = GraphBuilder("target", folder, PRECISIONS[engine.precision].data_type)
        kind = PagedDecoderGraph if self._paged else DecoderGraph
        graph = kind(
            builder,
            self._spec,
            self._target.tensor,
            precision=engine.precision,
            smoothing=smoothing,
        )
        taps = self._taps or (self._spec.num_layers - 1,)
        # Positions that a graph must know: the check and the measurements want a few of their own.
        reach = max(engine.max_tokens, _LEAST_POSITIONS) + self._block_size + 1
        graph.build(taps=taps, draft_vocab=self._draft_vocab, max_tokens=reach)
        builder.save()
        if self._draft_spec is not None:
            self._build_draft(folder, graph, builder.stored("model.embed_tokens"), reach)

    def _read_texts(self, folder: Path) -> Smoothing:
        """Run the example texts through an independent forward pass.

        The graphs are checked against its results. Large activations that it sees go into the
        weights, if the precision wants that.
        """
        vocab_size, most = self._spec.vocab_size, self._recipe.engine.max_tokens // 2
        tokenizer = Tokenizer.open(folder) if Tokenizer.present(folder) else None
        prompts = example_prompts(tokenizer, vocab_size=vocab_size)
        self._prompts = [prompt[:most] for prompt in prompts]
        rows = check_rows(tokenizer, self._prompts, vocab_size=vocab_size, max_tokens=most)
        total = sum(map(len, rows))
        self._progress(f"running {total:,} tokens of text through an independent forward pass")
        outliers, used = Outliers(), set[str]()

        def read(name: str) -> NDArray[Any]:
            used.add(name)
            return self._target.tensor(name)

        self._texts = Texts.from_rows(self._spec, read, rows, taps=self._taps, observe=outliers)
        check_all_used(self._target, self._spec, used)
        if not PRECISIONS[self._recipe.engine.precision].smoothed:
            return Smoothing()
        return Smoothing(outliers.factors(self._spec))

    def _build_draft(
        self, folder: Path, target: DecoderGraph, embed: StoredWeight, reach: int
    ) -> None:
        assert self._draft is not None
        assert self._draft_spec is not None
        assert self._draft_vocab is not None
        self._progress("building draft.onnx")
        assert self._recipe.draft is not None
        precision, weights = self._recipe.engine.precision, self._draft
        builder = GraphBuilder("draft", folder, PRECISIONS[precision].data_type)
        stored, rows = target.head_weights()
        kind = draft_graph(self._recipe.draft.drafter, paged=self._paged)
        graph = kind(builder, self._draft_spec, weights.tensor, precision=precision)
        graph.build(
            embed=embedding(weights, self._target, builder=builder, stored=embed),
            head=head(
                weights,
                self._target,
                tied=self._spec.tied_head,
                vocab=self._draft_vocab,
                stored=stored,
                rows=rows,
            ),
            draft_vocab=self._draft_vocab,
            max_tokens=reach,
        )
        for each in graph.builders:
            each.save()

    @contextmanager
    def _runnable(self, folder: Path) -> Iterator[Path]:
        """A folder with the graphs in a form that ONNX Runtime has kernels for."""
        if self._recipe.engine.precision != "bf16":
            yield folder
            return
        self._progress("ONNX Runtime has no bf16: the same graphs are checked in fp32")
        with TemporaryDirectory(prefix=f".{self._output.name}.", dir=folder.parent) as name:
            twin = Path(name)
            for path in folder.iterdir():
                if path.suffix == ".onnx":
                    in_fp32(path, twin)
                else:
                    _link(path, twin / path.name)
            yield twin

    def _build_plans(self, folder: Path, plans: PlansInfo) -> None:
        taps = self._taps or (self._spec.num_layers - 1,)
        build_plan_files(
            folder,
            plans,
            block_size=self._block_size,
            context_bytes=2 * len(taps) * self._spec.hidden_size,
            progress=self._progress,
        )

    def _check(self, folder: Path) -> dict[str, float]:
        precision = self._recipe.engine.precision
        self._progress("checking target.onnx against it")
        target = folder / "target.onnx"
        parity = check_target(
            target,
            self._spec,
            self._target.tensor,
            self._texts,
            precision=precision,
            paged=self._paged,
        )
        if self._draft_spec is not None:
            assert self._draft_info is not None
            assert self._draft_info.cache is not None
            self._progress("checking draft.onnx")
            graphs = {"draft.onnx": self._draft_spec}
            narrow = narrow_spec(self._draft_spec, precision)
            if narrow is not None:
                graphs["draft-narrow.onnx"] = narrow
            for name, spec in graphs.items():
                found = check_draft(
                    folder / name,
                    self._draft_info.cache,
                    self._reference_draft(spec),
                    self._texts,
                    precision=precision,
                    paged=self._paged,
                )
                parity = found | parity  # the manifest has the figures of whole blocks
        return parity

    def _reference_draft(self, spec: DraftSpec) -> ReferenceDraft:
        assert self._draft is not None
        assert self._draft_vocab is not None
        vocab = self._draft_vocab
        embed, table = tables(self._draft, self._target, tied=self._spec.tied_head, vocab=vocab)
        return ReferenceDraft(spec, self._draft.tensor, embed=embed, head=table, vocab=vocab)

    def _measure(self, folder: Path, parity: dict[str, float]) -> None:
        self._write_manifest(folder, parity, runtime=None if self._paged else "onnxruntime")
        on_cpu = Placement(device="cpu" if self._paged else "auto")
        engine = open_engine(folder, placement=on_cpu)
        self._progress("calibrating the draft's confidence")
        self._draft_info = calibrate(engine, self._prompts)
        if self._plans is None and not self._paged:
            ensure_costs(engine, progress=self._progress)
        engine.close()

    def _write_manifest(
        self, folder: Path, parity: dict[str, float], *, runtime: str | None = None
    ) -> None:
        apart = (FILE_NAME, COSTS_FILE)
        names = sorted(path.name for path in folder.iterdir() if path.name not in apart)
        manifest = EngineManifest(
            format=FORMAT,
            name=self._output.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=self._versions,
            runtime=runtime or self._recipe.engine.runtime,
            precision=self._recipe.engine.precision,
            target=self._target_info,
            draft=self._draft_info,
            limits=self._limits,
            has_tokenizer=Tokenizer.present(folder),
            files={name: describe_file(folder / name) for name in names},
            parity=parity,
            plans=self._plans,
        )
        (folder / FILE_NAME).write_text(manifest.model_dump_json(indent=1) + "\n")


def _origin(draft: DraftInfo | None) -> tuple[object, ...]:
    """What a draft was built from, without what was measured."""
    if draft is None:
        return ()
    lookup = (draft.lookup.drafter, draft.lookup.settings) if draft.lookup else ()
    return (draft.drafter, draft.source, draft.files, draft.block_size, *lookup)


def _lookup_info(section: DraftSection, block_size: int) -> LookupInfo | None:
    """The section's lookup before it has learnt anything; None where it asks for none."""
    if section.lookup_drafter is None or section.lookup_settings is None:
        return None
    return LookupInfo.untrained(
        section.lookup_drafter, section.lookup_settings, block_size=block_size
    )


def _lookup_alone(section: DraftSection) -> DraftInfo:
    """A draft without weights, before it is calibrated."""
    return DraftInfo(
        drafter=section.drafter,
        source=None,
        files={},
        block_size=section.block_size,
        lookup=_lookup_info(section, section.block_size),
        confidence_temperatures=(1.0,) * section.block_size,
        acceptance=(0.5,) * section.block_size,
    )


def _link(path: Path, link: Path) -> None:
    """The same file in another folder; a copy where the file system has no links."""
    try:
        link.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, link)
