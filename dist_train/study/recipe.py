"""What the recipe "Model 5 with dropout" claims, without figures, about learning from the final token alone."""

import math
from collections.abc import Sequence
from typing import Any

from dist_train.study.claims import (
    CORPUS,
    DROPOUT,
    OBJECTIVE,
    Claim,
    Measured,
    against,
    at_equal,
    difference,
    judge,
    on_the_richer_corpus,
    ratio,
    to_reach,
    with_dropout,
)
from dist_train.study.objectives import ALL, FINAL, FINE_TUNED, GROW, SHRINK

_FINAL_AGAINST_ALL = against(FINAL, ALL)
_FINAL_LOSS, _ALL_LOSS = "final_token_loss", "all_token_loss"
_NATS = "nats per token, final-token minus all-token training"
_TIMES = "times, final-token over all-token training"


def _of_final_against_all(id: str, text: str, effect: Any, unit: str, figure: str, **more: Any) -> Claim:
    return Claim(id, text, _FINAL_AGAINST_ALL, OBJECTIVE, effect, unit, figure, **more)


def claims(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return each claim with what the runs say of it, as `report.json` has them."""
    return [row for claim in _claims(_sequence_length(runs)) for row in judge(claim, runs)]


def _sequence_length(runs: Sequence[Measured]) -> int:
    return max((run.cell.settings.model.block_size for run in runs), default=1)


def _claims(T: int) -> list[Claim]:
    return [*_learning(), *_signal(T), *_surroundings(), *_text(), *_cost(), *_remedies()]


def _learning() -> list[Claim]:
    return [
        _of_final_against_all(
            "higher",
            "Final-token training ends at a higher loss, at equal updates",
            difference(_ALL_LOSS),
            _NATS,
            "losses",
            note="held-out loss of all tokens",
        ),
        _of_final_against_all(
            "higher-final",
            "… even at the final token, which is all that it learns",
            difference(_FINAL_LOSS),
            _NATS,
            "losses",
            note="held-out loss of the final token",
        ),
        _of_final_against_all(
            "noisier",
            "Its training loss fluctuates more",
            ratio("train_loss_noise"),
            _TIMES,
            "noise",
            is_ratio=True,
            note="standard deviation about a robust trend",
        ),
        _of_final_against_all(
            "noisier-token",
            "… by more than averaging over fewer tokens explains",
            _noise_per_token,
            _TIMES,
            "noise",
            is_ratio=True,
            note="standard deviation times the square root of supervised tokens per update",
        ),
        _of_final_against_all(
            "slower",
            "Its loss falls more slowly",
            to_reach("updates", _FINAL_LOSS),
            "times the updates to the same loss",
            "equal",
            is_ratio=True,
            note="to the lowest final-token loss that both reach",
        ),
    ]


def _noise_per_token(one: Measured, other: Measured) -> float | None:
    noise, tokens = ratio("train_loss_noise")(one, other), ratio("supervised_per_update")(one, other)
    return None if noise is None or tokens is None else noise + tokens / 2


def _signal(T: int) -> list[Claim]:
    return [
        _of_final_against_all(
            "signal",
            "A sequence carries less signal when only its final token is learned",
            ratio("noise_scale"),
            "times the sequences for as clear a gradient",
            "noise",
            is_ratio=True,
            note="gradient noise scale at equal updates, each of its own network",
        ),
        _of_final_against_all(
            "scatter",
            "… because its gradient scatters more from sequence to sequence",
            ratio("gradient_noise"),
            f"{_TIMES}: variance of single sequences' gradients",
            "noise",
            is_ratio=True,
        ),
        _of_final_against_all(
            "signal-factor",
            f"… {T} times less, as it has {T} tokens",
            ratio("noise_scale"),
            "times the sequences for as clear a gradient",
            "noise",
            is_ratio=True,
            is_value=True,
            expected=math.log(T),
            note="supported where all of the interval is half to twice that factor",
        ),
    ]


def _surroundings() -> list[Claim]:
    richer = "the more heterogeneous corpus minus the other"
    one_pair = "one pair of corpora, which differ in size and subject too; the interval is over seeds alone"
    return [
        Claim(
            "corpus",
            "A heterogeneous corpus makes the loss of final-token training higher",
            on_the_richer_corpus,
            CORPUS,
            difference(_FINAL_LOSS),
            f"nats per token, {richer}",
            "corpora",
            note=one_pair,
        ),
        Claim(
            "corpus-noise",
            "… and more noisy",
            on_the_richer_corpus,
            CORPUS,
            ratio("train_loss_noise"),
            "times, the more heterogeneous corpus over the other",
            "corpora",
            is_ratio=True,
            note=one_pair,
        ),
        Claim(
            "dropout",
            "Dropout narrows the gap between training text and held-out text",
            with_dropout,
            DROPOUT,
            difference("held-out.gap.all_token_loss"),
            "nats per token, with dropout minus without",
            "gap",
            expected=-1,
        ),
    ]


def _text() -> list[Claim]:
    unit = "final-token minus all-token training"
    return [
        _of_final_against_all(
            "spaces",
            "Its text lacks spaces",
            difference("text.model.spaces_per_character"),
            f"spaces per character, {unit}",
            "text",
            expected=-1,
        ),
        _of_final_against_all(
            "glued",
            "Its text glues tokens together",
            difference("text.model.glued_words"),
            f"share of words that are several known ones, {unit}",
            "text",
        ),
        _of_final_against_all(
            "misspelled",
            "It writes words that do not exist",
            difference("text.model.unknown_words"),
            f"share of words of three letters or more that the training text does not have, {unit}",
            "text",
        ),
        _of_final_against_all(
            "incoherent",
            "Its text is less coherent",
            difference("text.model.bits_per_character"),
            f"bits per character under a model of human text, {unit}",
            "text",
        ),
    ]


def _cost() -> list[Claim]:
    return [
        _of_final_against_all(
            "cheaper",
            "An update of final-token training is cheaper",
            ratio("step_seconds"),
            f"seconds: {_TIMES}",
            "cost",
            expected=-1,
            is_ratio=True,
        ),
        _of_final_against_all(
            "cheaper-flops",
            "… in arithmetic",
            ratio("update_flops"),
            f"FLOPs: {_TIMES}",
            "cost",
            expected=-1,
            is_ratio=True,
        ),
        _of_final_against_all(
            "inference",
            "It is closer to inference: better at full context than elsewhere",
            difference("position_gap"),
            "nats: all-token minus final-token loss, final-token minus all-token training",
            "positions",
        ),
        *(
            _of_final_against_all(
                f"poorer-{budget.replace(' ', '-')}-{loss.split('_')[0]}",
                f"It gets less from its resources: a higher loss at equal {budget}",
                at_equal(budget, loss),
                _NATS,
                "equal",
                note=f"held-out loss of {'the final token' if loss == _FINAL_LOSS else 'all tokens'}",
            )
            for budget in ("supervised tokens", "FLOPs", "seconds")
            for loss in (_FINAL_LOSS, _ALL_LOSS)
        ),
    ]


def _remedies() -> list[Claim]:
    def better(id: str, text: str, objective: str, note: str) -> Claim:
        unit = "nats per token, minus final-token training from the start"
        effect = at_equal("FLOPs", _FINAL_LOSS)
        return Claim(id, text, against(objective, FINAL), OBJECTIVE, effect, unit, "equal", expected=-1, note=note)

    return [
        better(
            "curriculum",
            "A curriculum from all tokens to the final one does better",
            SHRINK,
            "held-out loss of the final token, at equal FLOPs",
        ),
        better(
            "curriculum-grow",
            "… one from the final token to all of them does",
            GROW,
            "held-out loss of the final token, at equal FLOPs",
        ),
        better(
            "fine-tuning",
            "Fine-tuning pretrained weights does better",
            FINE_TUNED,
            "held-out loss of the final token, at equal FLOPs, pretraining counted; pretrained on all tokens of the "
            "same corpus in the same run. From other weights: not measured",
        ),
    ]
