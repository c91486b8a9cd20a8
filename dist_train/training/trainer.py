"""The loop: sample, forward, loss, backward, update, evaluate, record."""

import contextlib

import torch
from torch import Tensor
from torch.profiler import record_function

from dist_train.config import Settings
from dist_train.data.tokenizer import decode, end_of_text
from dist_train.model.generation import Sampling, generate
from dist_train.model.gpt import GPT
from dist_train.runtime.faults import strike
from dist_train.runtime.process import naming_lost_peers, start_process
from dist_train.runtime.stop import Stop, listening
from dist_train.training.assembly import Learner, Run, assemble
from dist_train.training.checkpoint import Progress
from dist_train.training.curriculum import last_k_at
from dist_train.training.ending import Ending, agree_to_end, end, raise_impossible, require_same_weights
from dist_train.training.loss import first_loss_warning, require_possible
from dist_train.training.memory import naming_memory, naming_memory_of_parts
from dist_train.training.meter import Update
from dist_train.training.optimizer import learning_rate, set_learning_rate
from dist_train.training.run_folder import RunFolder


def train(settings: Settings) -> RunFolder:
    """Train as `settings` say, on this process and those that were started beside it; return the run's folder.

    Data that is not there is prepared first; a run that is there is continued. Raises `DistTrainError`.
    """
    folder = RunFolder(settings.run.out_dir)
    with listening() as stop, start_process(settings.runtime) as process, contextlib.ExitStack() as held:
        process.on_main(lambda: held.enter_context(folder.claimed()))
        with naming_memory_of_parts():
            run = assemble(settings, process, folder)
        stop.is_deferred = True
        with (
            run.record,
            run.saver,
            run.profile,
            contextlib.closing(run.batches),
            naming_lost_peers(process),
            naming_memory(run),
        ):
            _loop(run, stop)
    return folder


def _loop(run: Run, stop: Stop) -> None:
    settings, max_iters = run.settings, run.settings.train.max_iters
    run.replica.network.train()
    run.meter.restart_clock()
    if run.start_step == 0:
        _evaluate(run, step=0)
    for step in range(run.start_step, max_iters):
        run.profile.at(step)
        finished = step + 1
        run.meter.add(finished, update(run, step))
        run.record.advance(finished)

        is_last = finished == max_iters
        if finished % settings.log.interval == 0:
            _flush(run)
        if is_last or _is_evaluated(finished, settings):
            _evaluate(run, finished)
        ending = Ending.DONE if is_last else agree_to_end(run, stop)
        if ending or finished % settings.checkpoint.interval == 0:
            _save(run, finished, ending)
        if ending:
            end(run, ending, finished)
            return


def _is_evaluated(step: int, settings: Settings) -> bool:
    is_power_of_two = step & (step - 1) == 0
    return step % settings.eval.interval == 0 or (settings.eval.early and is_power_of_two)


def update(run: Learner, step: int) -> Update:
    """Update the weights once, and wait for nothing on the device."""
    settings, last_k = run.settings, last_k_at(step, run.settings)
    rate = learning_rate(step, settings.optim, settings.train.max_iters)
    set_learning_rate(run.optimizer, rate)
    loss_sum, count = _accumulate_gradients(run, step, last_k)
    part_square_norm = run.replica.take_part_square_norm()
    grad_norm = run.replica.update(run.optimizer, settings.optim.grad_clip)
    run.replica.average.update(step)
    return Update(loss_sum, count, grad_norm, rate, last_k, part_square_norm)


def _accumulate_gradients(run: Learner, step: int, last_k: int) -> tuple[Tensor, int]:
    """Add up the gradients of one update's micro-batches; return this process's loss sum and its count of tokens."""
    train = run.settings.train
    inputs_BT, targets_BT = run.batches.at(step)
    # Dropout follows from (seed, step, rank): a resumed run drops what the uninterrupted one did.
    run.process.seed_dropout(run.settings.run.derive_seed("dropout", step, run.process.rank))
    total_sum = torch.zeros((), device=run.process.device)
    micro_batches = list(zip(inputs_BT.split(run.micro_batch), targets_BT.split(run.micro_batch), strict=True))
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        with run.replica.accumulating(is_last=number == len(micro_batches)):
            loss_sum = run.replica.loss(inputs, targets, last_k)
            loss_sum = strike(run.replica.network, loss_sum, run.process.rank, step)
            run.replica.backward(loss_sum, count=train.global_batch_size * last_k)
        total_sum += loss_sum.detach()
    return total_sum, len(inputs_BT) * last_k


def _flush(run: Run) -> None:
    """Record the updates since the last time. The run ends here if one of them had no possible loss or gradient."""
    lines, impossible = run.meter.flush()
    run.record.train(lines)
    if impossible:
        raise_impossible(run, impossible)


@record_function("evaluate")
def _evaluate(run: Run, step: int) -> None:
    """Measure and record the held-out losses after `step` updates."""
    _flush(run)
    run.record.doing("evaluating")
    settings = run.settings
    # Of the update before: what has been trained on, not what comes next.
    last_k = last_k_at(max(0, step - 1), settings)
    result = run.evaluator.evaluate(run.replica, last_k)
    for loss in (result.loss, result.final_token_loss, result.all_token_loss):
        require_possible(loss, step)
    samples = step * settings.train.global_batch_size
    # A curriculum's stages overlap in what they have seen; nobody counts that.
    coverage = None if settings.loss.curriculum else run.windows.target_coverage(samples, last_k)
    run.record.evaluation(step, {**vars(result), "target_coverage": coverage})
    is_untrained = step == 0 and settings.model.init_from is None
    if is_untrained and (warning := first_loss_warning(result.loss, run.encoding.n_vocab)):
        run.record.say(f"warning: {warning}")
    run.meter.restart_clock()


@record_function("save")
def _save(run: Run, step: int, ending: Ending) -> None:
    """Save the run after `step` updates, and a sample of what it writes by then, if there is time."""
    _flush(run)
    run.record.doing("saving")
    settings = run.settings
    progress = Progress(
        step=step,
        tokens=run.meter.tokens,
        supervised_tokens=run.meter.supervised_tokens,
        flops=run.meter.flops,
        noise=run.meter.noise_means,
        data_fingerprint=run.data.fingerprint,
        settings=settings.model_dump(mode="json"),
    )
    require_same_weights(run, step)
    # In this order: a network that has diverged cannot be sampled from, and must not become the newest checkpoint.
    text = _sample(run, step) if ending in (Ending.NOT_YET, Ending.DONE) else None
    run.process.on_main(lambda: _sync(run))
    run.saver.copy(run.replica, run.optimizer)

    def write() -> None:
        run.saver.write(progress, is_last=bool(ending))
        if text is not None:
            run.record.sample(step, text)

    run.process.on_main(write)
    run.meter.restart_clock()


def _sync(run: Run) -> None:
    """Have the disk hold all that a save is going to follow on."""
    run.record.sync()
    run.saver.wait()


def _sample(run: Run, step: int) -> str | None:
    """Return the prompt and what the network makes of it, on the first process."""
    sample = run.settings.sample
    prompt = run.encoding.encode_ordinary(sample.prompt) or [end_of_text(run.encoding)]
    generator = torch.Generator().manual_seed(run.settings.run.derive_seed("sample", step))

    def draw() -> str:
        assert isinstance(network, GPT)
        tokens = generate(network, prompt, sample.max_new_tokens, Sampling(sample.temperature), generator)
        return decode(run.encoding, tokens)

    with run.replica.evaluated() as network:
        return run.process.on_main(draw)
