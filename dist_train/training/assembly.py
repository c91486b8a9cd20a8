"""The parts of a run, and how they are put together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tiktoken
import torch
from torch import nn

from dist_train.config import Settings
from dist_train.data.batches import Batches
from dist_train.data.manifest import TokenData, is_prepared, open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.tokenizer import load_tokenizer
from dist_train.data.windows import Windows
from dist_train.errors import UserError
from dist_train.model.gpt import GPT, build, recompute_blocks
from dist_train.model.pretrained import Weights, load, require_fit
from dist_train.runtime.parallel import Replica
from dist_train.runtime.precision import choose_precision
from dist_train.runtime.process import Process
from dist_train.runtime.shares import micro_batch_size
from dist_train.training.checkpoint import checkpoints_in
from dist_train.training.checkpoint_writer import CheckpointWriter
from dist_train.training.curriculum import last_k_at
from dist_train.training.evaluation import Evaluator
from dist_train.training.initial_weights import bit_sums, open_weights
from dist_train.training.loss import LastKLoss
from dist_train.training.meter import Meter
from dist_train.training.optimizer import build_optimizer
from dist_train.training.profiling import NullProfile, open_profile
from dist_train.training.resume import resume
from dist_train.training.run_folder import RunFolder, code_hash
from dist_train.training.telemetry import NullRecord, Record
from dist_train.training.writers import require_writers


@dataclass(kw_only=True)
class Learner:
    """The parts that an update of the weights takes: of a run, and of a benchmark that times updates alone."""

    settings: Settings
    process: Process
    windows: Windows
    batches: Batches
    replica: Replica
    optimizer: torch.optim.Optimizer

    @property
    def micro_batch(self) -> int:
        """Sequences that this process takes at once."""
        return micro_batch_size(self.settings.train, self.process.world_size)


@dataclass(kw_only=True)
class Run(Learner):
    """All parts that the loop puts to work."""

    encoding: tiktoken.Encoding
    data: TokenData
    evaluator: Evaluator
    meter: Meter
    folder: RunFolder
    record: NullRecord
    profile: NullProfile
    saver: CheckpointWriter
    """Saves on the first process, and does nothing elsewhere."""
    start_step: int


def assemble(settings: Settings, process: Process, folder: RunFolder) -> Run:
    """Build every part of the run, bring it to where a former one stopped, and see that all processes agree.

    What may fail on one process is done by all together: alone, it would leave the others waiting in a collective.
    """
    process.together(lambda: _refuse(settings, process, folder))
    process.on_main(lambda: require_writers(settings))
    # Before anything is built of them: DDP has its own, less readable answer to networks of different shapes.
    _require_agreement(process, {**settings.by_key(), "code": code_hash(), "torch": torch.__version__})
    weights = process.together(lambda: _open_weights(settings, folder))
    process.on_main(lambda: require_data(settings))
    encoding, data = process.together(lambda: (load_tokenizer(settings.data.tokenizer), open_tokens(settings.data)))
    _require_agreement(process, {"data": data.fingerprint})
    windows, evaluator = process.together(
        lambda: (windows_of(settings, data), Evaluator(settings, data.val, encoding.n_vocab, process))
    )
    network = process.together(lambda: _build_network(settings, encoding.n_vocab, weights, process))
    _require_agreement(process, {"weights to start from": weights and sum(bit_sums(network).values())})
    learner = build_learner(settings, process, data, windows, network, LastKLoss(network))
    meter = Meter(settings, network.token_embedding.num_embeddings, process, learner.replica)

    resumed = process.together(
        lambda: resume(folder.checkpoints, settings, data.fingerprint, learner.replica, learner.optimizer)
    )
    _require_agreement(process, {"checkpoint": str(resumed and resumed.path)})
    start_step = 0
    if resumed:
        progress = resumed.progress
        start_step, meter.flops = progress.step, progress.flops
        meter.tokens, meter.supervised_tokens = progress.tokens, progress.supervised_tokens
        meter.noise_means = progress.noise
    saver = CheckpointWriter(folder.checkpoints, settings.checkpoint.keep)
    opened = process.on_main(lambda: _open_folder(settings, process, folder, saver, learner, start_step))
    record, profile = opened or (NullRecord(), NullProfile())
    run = Run(
        **vars(learner),
        encoding=encoding,
        data=data,
        evaluator=evaluator,
        meter=meter,
        folder=folder,
        record=record,
        profile=profile,
        saver=saver,
        start_step=start_step,
    )
    run.record.say(_describe(run, network))
    if resumed and resumed.changed:
        run.record.say(f"continued with other settings: {', '.join(resumed.changed)}")
    return run


def _refuse(settings: Settings, process: Process, folder: RunFolder) -> None:
    """Raise `UserError` for what can be told before anything is done."""
    micro_batch_size(settings.train, process.world_size)
    if _is_cut(settings, process) and choose_precision(settings.runtime, process.device) == torch.float16:
        raise UserError("runtime.parallel: fsdp does not scale gradients, which fp16 needs; use bf16, fp32 or ddp")
    if settings.checkpoint.resume == "never" and folder.has_run():
        raise UserError(f"run.out_dir: {folder.root} has a run and checkpoint.resume is never; choose another folder")


def _open_weights(settings: Settings, folder: RunFolder) -> Weights | None:
    """Return what a new run is to start from, None for one that goes on or starts from chance.

    Before data is prepared, which may take hours. Raises `UserError` unless the weights fit the settings.
    """
    if settings.model.init_from is None or checkpoints_in(folder.checkpoints):
        return None
    with _naming_init_from():
        weights = open_weights(settings.model.init_from)
    require_fit(weights, settings.model, load_tokenizer(settings.data.tokenizer).n_vocab)
    return weights


def _build_network(settings: Settings, n_vocab: int, weights: Weights | None, process: Process) -> GPT:
    # Of one that is going to be cut the device need never hold all.
    device = torch.device("cpu") if _is_cut(settings, process) else process.device
    network = build(settings.model, n_vocab, settings.run.derive_seed("weights"), device)
    if weights:
        with _naming_init_from():
            load(network, weights)
    return network


@contextmanager
def _naming_init_from() -> Iterator[None]:
    """Name the setting in what is wrong with the weights, which others read too."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None


def _open_folder(
    settings: Settings, process: Process, folder: RunFolder, saver: CheckpointWriter, learner: Learner, start_step: int
) -> tuple[NullRecord, NullProfile]:
    """Return the record and the profile of the run, in a folder that has room for what it is going to hold."""
    folder.create(settings, process)
    if start_step < settings.train.max_iters:
        saver.open(learner.replica, learner.optimizer)
    record = Record(folder, settings, start_step)
    return record, open_profile(settings, folder.profile, start_step, process.device, record.say)


def build_learner(
    settings: Settings, process: Process, data: TokenData, windows: Windows, network: GPT, objective: nn.Module
) -> Learner:
    """Return what updates `network` by `objective`, a module around it called as `LastKLoss` is."""
    batch_size = settings.train.global_batch_size
    if settings.runtime.recompute_blocks:
        recompute_blocks(network)
    return Learner(
        settings=settings,
        process=process,
        windows=windows,
        batches=Batches(
            data.train, windows, network.n_vocab, batch_size, process.rank, process.world_size, process.device
        ),
        replica=replicate(network, objective, process, settings),
        # After it, as it may have cut the parameters.
        optimizer=build_optimizer(network, settings.optim),
    )


def replicate(network: GPT, objective: nn.Module, process: Process, settings: Settings) -> Replica:
    """Return what `runtime.parallel` says: this process's copy of a network, or its part of one."""
    kind = Replica
    if _is_cut(settings, process):
        from dist_train.runtime.sharding import ShardedReplica  # takes a second to import

        kind = ShardedReplica
    return kind(network, objective, process, settings.runtime, settings.optim.ema_decay)


def _is_cut(settings: Settings, process: Process) -> bool:
    return settings.runtime.parallel == "fsdp" and process.world_size > 1


def _require_agreement(process: Process, facts: dict[str, Any]) -> None:
    """Raise `UserError` that names the process that differs from the first in one of `facts`, and in which."""
    if differing := process.disagreement(facts):
        error = UserError(f"{differing}; start all processes with the same command on the same files")
        error.said_by = 0
        raise error


def require_data(settings: Settings) -> None:
    """Prepare the data where it is not there yet."""
    if not is_prepared(settings.data.dir):
        prepare(settings.data)


def windows_of(settings: Settings, data: TokenData) -> Windows:
    """Return where the windows of the training tokens lie. Raises `UserError` if there is none."""
    block_size = settings.model.block_size
    if len(data.train) <= block_size:
        raise UserError(
            f"{settings.data.dir} has {len(data.train)} training tokens, fewer than one window of "
            f"model.block_size={block_size} + 1; prepare more text, or lower model.block_size"
        )
    return Windows(
        n_tokens=len(data.train),
        block_size=block_size,
        sampling=settings.data.sampling,
        stride=settings.data.stride or block_size,
        seed=settings.run.derive_seed("windows"),
    )


def _describe(run: Run, network: GPT) -> str:
    """Say in three lines what is about to run."""
    settings, process = run.settings, run.process
    model, train = settings.model, settings.train
    precision = str(run.replica.precision).removeprefix("torch.")
    continued = f", continued from step {run.start_step}" if run.start_step else ""
    if run.start_step >= train.max_iters:
        continued = ": finished before; another --run.out_dir starts another"
    return "\n".join(
        [
            f"network  {network.n_parameters() / 1e6:.1f} M parameters, {model.n_layer} layers, {model.n_head} heads, "
            f"{model.n_embd} wide; on {process.world_size} × {process.device.type}, {precision}",
            f"data     {settings.data.dir}: {len(run.data.train):,} tokens to train on, {len(run.data.val):,} held out",
            f"loss     {_seen(settings)} of {model.block_size} positions; {train.global_batch_size} sequences "
            f"per update, {train.max_iters} updates{continued}",
        ]
    )


def _seen(settings: Settings) -> str:
    """Say which positions the loss sees."""
    first, last = (last_k_at(step, settings) for step in (0, settings.train.max_iters - 1))
    return f"the last {first}" if settings.loss.curriculum is None else f"first the last {first}, in the end {last}"
