"""Whether a client read a checkpoint as our own runtime does.

A client is right if every linear of it multiplies by the weight that is written, bit for bit. Its logits then follow
ours up to rounding: of fp32 where it computes in fp32, of bf16 where it computes in bf16.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load
from llmquant.scheme import dequantize

IDS = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(0))
TEXT = (
    "The lighthouse keeper counted the ships each evening, wrote the number in a ledger and compared it with the day "
    "before. On the first night of winter there were none, and so he lit a second lamp, for whoever was late."
)

# Where the weights are equal only the order of sums differs: some 2**-24 in each product, 1e-6 and less at the end.
FP32_ROUNDING = 1e-5


def needs(*packages: str, target: str = "clients") -> pytest.MarkDecorator:
    """Skip the tests of a client where a package of it is not installed; `target` is the one of make that has them."""
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed; run make {target}")


class RealLinear(torch.nn.Linear):
    """A quantized weight as real numbers."""


def real(directory: Path) -> PreTrainedModel:
    """Our model in fp32 with its weights as real numbers, for products without any rounding of activations."""
    model = load(directory, torch.float32)
    for name, linear in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]:
        q = linear.kernels.unpack(linear.packed, linear.out_features, linear.in_features, linear.scheme)
        plain = RealLinear(linear.in_features, linear.out_features, bias=False)
        plain.weight.data = dequantize(q, linear.scheme)
        plain.bias = linear.bias
        model.set_submodule(name, plain)
    return model


def check_fp32(client: PreTrainedModel, directory: Path, ids: Tensor = IDS) -> None:
    """The same weights, the same logits but for the order of sums, the same greedy continuation."""
    ours = real(directory)
    assert distance(logits(client, ids), logits(ours, ids)) < FP32_ROUNDING
    assert differing_weights(client, ours) == []  # some clients unpack their weights when first called, above
    assert torch.equal(greedy(client, ids[:1]), greedy(ours, ids[:1]))


def check_bf16(client: PreTrainedModel, directory: Path, ids: Tensor = IDS) -> None:
    """Logits no farther from ours in fp32 than bf16 explains.

    The yardstick is our own runtime, whose weights are always exact, with bf16 activations. A client may round its
    weights to bf16 as well, which errs about as much again; a wrong weight is farther off by orders of magnitude.
    """
    exact = logits(real(directory), ids)
    noise = distance(logits(load(directory, torch.bfloat16), ids), exact)
    assert client.dtype == torch.bfloat16
    assert noise < 0.05
    assert distance(logits(client, ids), exact) < 2 * noise


@torch.inference_mode()
def differing_weights(client: PreTrainedModel, ours: PreTrainedModel, stored: torch.dtype = torch.float32) -> list[str]:
    """The linears in which `client`, a model in fp32, does not multiply by exactly the weight of `real` in `stored`.

    The product with the unit vectors is the weight itself, whatever computes it: each sum has a single term.
    """
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, RealLinear)}
    assert linears
    return [name for name, own in linears.items() if not _same(client.get_submodule(name), own, stored)]


def _same(theirs: torch.nn.Module, own: RealLinear, stored: torch.dtype) -> bool:
    expected = own.weight.T.to(stored).float()
    return torch.equal(theirs(torch.eye(own.in_features)), expected if own.bias is None else expected + own.bias)


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """fp32 [sequences, tokens, vocabulary]."""
    return model(input_ids=ids).logits.float()


def greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The prompt `ids` [1, tokens] and the 16 tokens that the model continues it with."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())
