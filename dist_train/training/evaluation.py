"""Held-out losses on a fixed set of windows: by position, and from that the final-token and the all-token loss."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train.config import Settings
from dist_train.data.batches import read_windows
from dist_train.data.shards import TokenStream
from dist_train.data.windows import evenly_spaced
from dist_train.errors import UserError
from dist_train.model.gpt import GPT
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process
from dist_train.runtime.shares import micro_batch_size
from dist_train.training.loss import rows_at_once


@dataclass(frozen=True)
class Evaluation:
    """Mean held-out losses in nats per token."""

    loss: float
    """Over the last k positions, what training minimises."""
    final_token_loss: float
    all_token_loss: float
    loss_by_position: list[float]
    """[T], of the first target to the last."""
    seconds: float


class Evaluator:
    """The same held-out windows every time, on the first process or spread over all: the result is the same."""

    def __init__(self, settings: Settings, stream: TokenStream, n_vocab: int, process: Process) -> None:
        block_size = settings.model.block_size
        if len(stream) <= block_size:
            raise UserError(
                f"the held-out part in {settings.data.dir} has {len(stream)} tokens, fewer than one window of "
                f"block_size={block_size} + 1; prepare more text, or raise data.val_fraction"
            )
        count = settings.eval.batches * settings.train.global_batch_size
        starts = evenly_spaced(len(stream), block_size, count)
        shares = process.world_size if settings.eval.ranks == "all" else 1
        # A rank without a share adds nothing to the sums, and by waiting for them waits for the evaluation.
        self._starts = np.array_split(starts, shares)[process.rank] if process.rank < shares else starts[:0]
        self._stream, self._block_size, self._n_vocab = stream, block_size, n_vocab
        self._micro_batch = micro_batch_size(settings.train, process.world_size)
        self._process = process

    def evaluate(self, replica: Replica, last_k: int) -> Evaluation:
        """Return the held-out losses, on all processes, `loss` over the last `last_k` positions.

        Draws no random number.
        """
        started = time.perf_counter()
        # One more number than positions: how many windows were seen.
        sums = torch.zeros(self._block_size + 1, dtype=torch.float64)
        with replica.evaluated() as network:
            assert isinstance(network, GPT)
            for at in range(0, len(self._starts), self._micro_batch):
                starts = self._starts[at : at + self._micro_batch]
                tokens = read_windows(self._stream, starts, self._block_size, self._n_vocab).to(self._process.device)
                sums[:-1] += losses_BT(network, tokens).sum(dim=0).cpu().double()
                sums[-1] += len(starts)
        sums = self._process.patient_sum(sums)
        loss_T = sums[:-1] / sums[-1]
        return Evaluation(
            loss=loss_T[-last_k:].mean().item(),
            final_token_loss=loss_T[-1].item(),
            all_token_loss=loss_T.mean().item(),
            loss_by_position=loss_T.tolist(),
            seconds=time.perf_counter() - started,
        )


def losses_BT(network: GPT, tokens: Tensor) -> Tensor:
    """Return −log P of every target of the windows [B, T+1], float32 [B, T], without ever holding all logits."""
    hidden_BTD = network.hidden(tokens[:, :-1], last_k=tokens.size(1) - 1)
    rows = rows_at_once(network)
    losses = [
        F.cross_entropy(network.logits(hidden).float(), targets, reduction="none")
        for hidden, targets in zip(
            hidden_BTD.flatten(0, 1).split(rows), tokens[:, 1:].flatten().split(rows), strict=True
        )
    ]
    return torch.cat(losses).view(hidden_BTD.shape[:2])
