"""Assemble the parts of a run, then the loop on one page."""

import hashlib
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor, nn

from dist_train.config import Settings
from dist_train.data.batches import Batches
from dist_train.data.manifest import TokenData, is_prepared, open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.tokenizer import decode, end_of_text, load_tokenizer
from dist_train.data.windows import Windows
from dist_train.errors import UserError
from dist_train.model.generation import generate
from dist_train.model.gpt import GPT, build
from dist_train.runtime.parallel import Replica, micro_batch_size
from dist_train.runtime.process import Process, naming_lost_peers, start_process
from dist_train.training import checkpoint
from dist_train.training.evaluation import Evaluator
from dist_train.training.loss import cross_entropy, first_loss_warning
from dist_train.training.meter import Meter
from dist_train.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from dist_train.training.run_folder import RunFolder, code_hash
from dist_train.training.telemetry import NullRecord, Record


def train(settings: Settings) -> RunFolder:
    """Train as `settings` say, on this process and those that torchrun started beside it; return the run's folder.

    Data that is not there is prepared first; a run that is there is continued. Raises `DistTrainError`.
    """
    with start_process(settings.runtime) as process:
        run = _assemble(settings, process)
        with run.record, naming_lost_peers(process.rank):
            _loop(run)
        run.batches.close()
    return run.folder


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
class _Run(Learner):
    """The parts that the loop puts to work."""

    encoding: tiktoken.Encoding
    data: TokenData
    evaluator: Evaluator
    meter: Meter
    folder: RunFolder
    record: NullRecord
    start_step: int


# ---- the loop --------------------------------------------------------------------------------------------------------


def _loop(run: _Run) -> None:
    settings, max_iters = run.settings, run.settings.train.max_iters
    run.replica.network.train()
    if run.start_step == 0:
        _evaluate(run, step=0)
    for step in range(run.start_step, max_iters):
        loss_sum, count, grad_norm, rate = update(run, step)
        finished = step + 1
        run.meter.add(finished, loss_sum, count, grad_norm, rate)
        run.record.advance(finished)

        is_last = finished == max_iters
        if is_last or finished % settings.log.interval == 0:
            run.record.train(run.meter.flush())
        if is_last or finished % settings.eval.interval == 0:
            _evaluate(run, finished)
        if is_last or finished % settings.checkpoint.interval == 0:
            _save(run, finished)


def update(run: Learner, step: int) -> tuple[Tensor, int, Tensor, float]:
    """Update the weights; return this process's loss sum and count, the gradient's norm, and the learning rate.

    Waits for nothing on the device: sum and norm are scalars there.
    """
    settings = run.settings
    rate = learning_rate(step, settings.optim, settings.train.max_iters)
    set_learning_rate(run.optimizer, rate)
    loss_sum, count = _accumulate_gradients(run, step)
    return loss_sum, count, run.replica.update(run.optimizer, settings.optim.grad_clip), rate


def _accumulate_gradients(run: Learner, step: int) -> tuple[Tensor, int]:
    """Add up the gradients of one update's micro-batches; return this process's loss sum and its count of tokens."""
    last_k, train = run.settings.last_k, run.settings.train
    inputs_BT, targets_BT = run.batches.at(step)
    # Dropout follows from (seed, step, rank): a resumed run drops what the uninterrupted one did.
    run.process.seed_dropout(run.settings.run.derive_seed("dropout", step, run.process.rank))
    total = torch.zeros((), device=run.process.device)
    micro_batches = list(zip(inputs_BT.split(run.micro_batch), targets_BT.split(run.micro_batch), strict=True))
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        with run.replica.accumulating(is_last=number == len(micro_batches)):
            logits_BSV = run.replica.forward(inputs, last_k)
            loss_sum = cross_entropy(logits_BSV, targets[:, -last_k:])
            run.replica.backward(loss_sum, count=train.global_batch_size * last_k)
        total += loss_sum.detach()
    return total, inputs_BT.size(0) * last_k


def _evaluate(run: _Run, step: int) -> None:
    """Measure and record the held-out losses after `step` updates."""
    run.record.train(run.meter.flush())
    run.record.doing("evaluating")
    result = run.evaluator.evaluate(run.replica)
    samples = step * run.settings.train.global_batch_size
    coverage = run.windows.target_coverage(samples, run.settings.last_k)
    run.record.evaluation(step, {**vars(result), "target_coverage": coverage})
    if step == 0 and (warning := first_loss_warning(result.loss, run.encoding.n_vocab)):
        run.record.say(f"warning: {warning}")
    run.meter.restart_clock()


def _save(run: _Run, step: int) -> None:
    """Save the run after `step` updates, and a sample of what it writes by then."""
    run.record.train(run.meter.flush())
    run.record.doing("saving")
    settings = run.settings
    progress = checkpoint.Progress(
        step=step,
        tokens=run.meter.tokens,
        supervised_tokens=run.meter.supervised_tokens,
        data_fingerprint=run.data.fingerprint,
        settings=settings.model_dump(mode="json"),
    )

    def save_and_sample() -> None:
        checkpoint.save(run.folder.checkpoints, settings.checkpoint.keep, run.replica, run.optimizer, progress)
        run.record.sample(step, _sample(run, step))

    run.process.on_main(save_and_sample)
    run.meter.restart_clock()


def _sample(run: _Run, step: int) -> str:
    """Return the prompt and what the network makes of it."""
    sample = run.settings.sample
    assert isinstance(run.replica.network, GPT)
    prompt = run.encoding.encode_ordinary(sample.prompt) or [end_of_text(run.encoding)]
    generator = torch.Generator().manual_seed(run.settings.run.derive_seed("sample", step))
    with run.replica.autocast():
        tokens = generate(run.replica.network, prompt, sample.max_new_tokens, sample.temperature, generator)
    return decode(run.encoding, tokens)


# ---- assembling ------------------------------------------------------------------------------------------------------


def _assemble(settings: Settings, process: Process) -> _Run:
    """Build every part of the run, bring it to where a former one stopped, and see that all processes agree."""
    micro_batch_size(settings.train, process.world_size)  # refuses what cannot be divided, before anything is done
    folder = RunFolder(settings.run.out_dir)
    if settings.checkpoint.resume == "never" and folder.has_run():
        raise UserError(f"run.out_dir: {folder.root} has a run and checkpoint.resume is never; choose another folder")
    process.on_main(lambda: require_data(settings))
    encoding, data = load_tokenizer(settings.data.tokenizer), open_tokens(settings.data)
    network = build(settings.model, encoding.n_vocab, settings.run.derive_seed("weights"), process.device)
    learner = build_learner(settings, process, data, encoding.n_vocab, network)
    replica = learner.replica
    meter = Meter(settings, encoding.n_vocab, process, replica)

    saved = checkpoint.find_newest(folder.checkpoints)
    start_step = 0
    if saved:
        progress = checkpoint.load(saved, settings, data.fingerprint, replica, learner.optimizer)
        start_step, meter.tokens, meter.supervised_tokens = progress.step, progress.tokens, progress.supervised_tokens
    facts = {"settings": settings.to_yaml(), "code": code_hash(), "data": data.fingerprint, "step": str(start_step)}
    process.agree({name: hashlib.sha256(fact.encode()).hexdigest() for name, fact in facts.items()})
    process.on_main(lambda: folder.create(settings, process))
    record = Record(folder, start_step, settings.train.max_iters) if process.is_main else NullRecord()
    record.say(_describe(settings, network, data, process, replica, saved is not None, start_step))
    return _Run(
        **vars(learner),
        encoding=encoding,
        data=data,
        evaluator=Evaluator(settings, data.val, encoding.n_vocab, process),
        meter=meter,
        folder=folder,
        record=record,
        start_step=start_step,
    )


def build_learner(settings: Settings, process: Process, data: TokenData, n_vocab: int, network: nn.Module) -> Learner:
    """Return what updates `network`, which takes tokens [B, T] and last_k and returns logits [B, last_k, V]."""
    windows, batch_size = _windows(settings, data), settings.train.global_batch_size
    return Learner(
        settings=settings,
        process=process,
        windows=windows,
        batches=Batches(data.train, windows, n_vocab, batch_size, process.rank, process.world_size, process.device),
        replica=Replica(network, process, settings.runtime),
        optimizer=build_optimizer(network, settings.optim),
    )


def require_data(settings: Settings) -> None:
    """Prepare the data where it is not there yet."""
    if not is_prepared(settings.data.dir):
        prepare(settings.data)


def _windows(settings: Settings, data: TokenData) -> Windows:
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


def _describe(
    settings: Settings,
    network: GPT,
    data: TokenData,
    process: Process,
    replica: Replica,
    is_resumed: bool,
    start_step: int,
) -> str:
    """Say in three lines what is about to run."""
    model, train = settings.model, settings.train
    precision = str(replica.precision).removeprefix("torch.")
    return "\n".join(
        [
            f"network  {network.n_parameters() / 1e6:.1f} M parameters, {model.n_layer} layers, {model.n_head} heads, "
            f"{model.n_embd} wide; on {process.world_size} × {process.device.type}, {precision}",
            f"data     {settings.data.dir}: {len(data.train):,} tokens to train on, {len(data.val):,} held out",
            f"loss     the last {settings.last_k} of {model.block_size} positions; {train.global_batch_size} sequences "
            f"per update, {train.max_iters} updates" + (f", continued from step {start_step}" if is_resumed else ""),
        ]
    )
