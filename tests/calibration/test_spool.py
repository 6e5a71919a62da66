"""States in a file: the same numbers, no name on the disk, and an error where there is no room."""

import resource
from pathlib import Path

import pytest
import torch

from llmquant.calibration.spool import Spool
from llmquant.errors import OutputError


def states() -> list[torch.Tensor]:
    shapes = ((2, 5, 8), (1, 7, 8))
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_what_it_is_given_and_what_is_assigned(tmp_path: Path, dtype: torch.dtype) -> None:
    given = [state.to(dtype) for state in states()]
    spool = Spool(given, tmp_path)
    assert len(spool) == 2
    assert all(map(torch.equal, spool, given))
    spool[1] = given[1] * 2
    assert torch.equal(spool[1], given[1] * 2)
    assert torch.equal(spool[0], given[0])
    assert all(state.dtype == dtype for state in spool[:])


def test_what_it_was_made_from_does_not_follow(tmp_path: Path) -> None:
    given = states()
    spool = Spool(given, tmp_path)
    spool[0] = torch.zeros_like(given[0])
    assert all(map(torch.equal, given, states()))


def test_states_that_are_not_contiguous(tmp_path: Path) -> None:
    state = states()[0].transpose(1, 2)
    assert torch.equal(Spool([state], tmp_path)[0], state)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    spool = Spool(states(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(spool[0], states()[0])


def test_no_room_is_an_error_at_the_start(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OutputError, match=rf"{tmp_path}: cannot write 544 bytes: .*; free space"):
            Spool(states(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
