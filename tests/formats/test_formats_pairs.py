"""What one layout holds, any other that can hold it gives back bit for bit: every pair, group size and symmetry."""

from itertools import permutations

import pytest
import torch
from formats_cases import SCHEMES, quantized

from llmquant.formats import FORMATS
from llmquant.scheme import Scheme

BF16 = torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("a", "b"), list(permutations(FORMATS, 2)))
def test_there_and_back(scheme: Scheme, a: str, b: str) -> None:
    first, second = FORMATS[a], FORMATS[b]
    q = quantized(scheme, m=32, lowest_zero=1)  # version 1 of GPTQ has no place for 0
    m, n = q.codes.shape
    if reason := first.refuse(m, n, scheme) or second.refuse(m, n, scheme):
        assert scheme.bits != 4, reason
        return
    before = first.pack("p", q, scheme, BF16)
    there = second.pack("p", first.unpack("p", before, m, n, scheme), scheme, BF16)
    back = first.pack("p", second.unpack("p", there, m, n, scheme), scheme, BF16)
    assert before.keys() == back.keys()
    for name, tensor in before.items():
        assert tensor.dtype == back[name].dtype
        assert torch.equal(tensor, back[name])
