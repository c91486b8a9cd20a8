"""The plain way to train on the last k positions, to compare with: compute everything, and slice afterwards."""

from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.model.cost import step_flops
from dist_train.model.dropout import Dropout
from dist_train.model.gpt import GPT, Attention, Block
from dist_train.training.loss import LastKLoss, cross_entropy


def trainer(network: GPT) -> nn.Module:
    """Return the objective as the project has it: the last block and the head work for S positions."""
    return LastKLoss(network)


def plain(network: GPT) -> nn.Module:
    """Return the objective as most code has it: torch's dropout, and logits for all T positions, of which S count.

    Changes `network`.
    """
    for module in list(network.modules()):
        if isinstance(module, Attention):
            module.attend = _attend
        if isinstance(module, Block):
            # Keeps what it computes.
            module.mlp = nn.Sequential(module.mlp.expand, module.mlp.activation, module.mlp.project)  # type: ignore[assignment]
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return _SlicingLogits(network)


def head_sliced(network: GPT) -> nn.Module:
    """Return the objective with all blocks at all T positions, and final norm and head at the last S alone.

    Changes `network`.
    """
    last = network.blocks[-1]
    assert isinstance(last, Block)
    network.blocks[-1] = _EveryPosition(last)
    return LastKLoss(network)


VARIANTS = {"trainer": trainer, "plain": plain, "head_sliced": head_sliced}


class _SlicingLogits(nn.Module):
    """Cross-entropy on the last S of all T positions' logits."""

    def __init__(self, network: GPT) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, last_k: int) -> Tensor:
        T = tokens_BT.size(1)
        return cross_entropy(self.network(tokens_BT, T)[:, T - last_k :], targets_BT[:, T - last_k :])


class _EveryPosition(nn.Module):
    """Has a block work for all T positions and keeps the last S: what `last_k` saves within it is not saved."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BTD: Tensor, last_k: int, past: None = None) -> Tensor:
        T = x_BTD.size(1)
        return self.block(x_BTD, T)[:, T - last_k :]


def _attend(query_BHSE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(query_BHSE, key_BHTE, value_BHTE, dropout_p=dropout, is_causal=True)


def variant_flops(network: GPT, sequences: int, last_k: int, recomputes: bool = False) -> dict[str, int]:
    """Return the FLOPs that each variant really executes in one step of `sequences`, as `step_flops` counts them."""
    settings, rows = network.settings, network.token_embedding.num_embeddings

    def flops(n_rows: int, positions: int) -> int:
        return step_flops(settings, n_rows, sequences, positions, recomputes)

    T = settings.block_size
    # A head without rows costs nothing: the blocks alone.
    head = flops(rows, last_k) - flops(0, last_k)
    return {"trainer": flops(rows, last_k), "plain": flops(rows, T), "head_sliced": flops(0, T) + head}
