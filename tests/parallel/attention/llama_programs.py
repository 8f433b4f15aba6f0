"""What the members of a group do in the tests of whole models; the model is random, of a few layers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from parallel.attention import sequence_parallel
from parallel.attention.shares import Balance


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(  # type: ignore[call-arg]  # `attn_implementation` is one of any keywords
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).double()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")


def errors(comm: Communicator, length: int, balance: str, scheme: str, documents: list[int]) -> list[float]:
    """Of the logits of this rank's rows, and of the gradients of all weights, against the whole model."""
    model, alone = llama(), llama()
    ids = torch.arange(length).mul(7).remainder(61).unsqueeze(0)
    targets = ids.roll(-1, 1)
    spread_over = Balance(balance, tuple(documents))
    mask = None
    positions = torch.arange(length).unsqueeze(0)
    if documents:
        number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        mask = ((number[:, None] == number[None, :]).tril()).view(1, 1, length, length)
        positions = torch.cat([torch.arange(count) for count in documents]).unsqueeze(0)
    right = alone(ids, position_ids=positions, attention_mask=mask).logits
    loss_of(right, targets).backward()  # type: ignore[no-untyped-call]
    with sequence_parallel(comm, length, spread_over, scheme=scheme) as spread:
        mine = model(
            spread.shard(ids, 1), position_ids=spread.position_ids, attention_mask=spread.attention_mask
        ).logits
        loss_of(mine, spread.shard(targets, 1)).backward()  # type: ignore[no-untyped-call]
    worst = float((mine - right[:, spread.indices]).detach().abs().max())
    gradients = [weight.grad for weight in model.parameters()]
    comm.all_reduce_coalesced(gradients)
    pairs = zip(gradients, (weight.grad for weight in alone.parameters()), strict=True)
    return [worst, max(float((ours - theirs).abs().max()) for ours, theirs in pairs)]


def refusals(comm: Communicator) -> list[str]:
    """What is said to what cannot be spread."""
    q, said = torch.zeros(1, 2, 4, 4), []
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (q, {"attn_mask": torch.ones(4, 4, dtype=torch.bool)}),
        (q, {"dropout_p": 0.1}),
        (torch.zeros(1, 4, 4, 4), {}),
        (torch.zeros(1, 2, 3, 4), {}),
    ]
    with sequence_parallel(comm, 4 * comm.size, "contiguous"):
        for query, given in cases:
            try:
                F.scaled_dot_product_attention(query, q, q, **given)
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    return said
