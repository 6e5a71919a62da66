"""Tiles by device: the default, what was measured, and the file that keeps it."""

from pathlib import Path

import pytest
import torch

from llmquant.errors import RecipeError
from llmquant.kernels import tuning
from llmquant.kernels.tuning import CANDIDATES, Config

HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    return tmp_path / "llmquant" / "triton-interpreter.json"


@pytest.mark.parametrize(
    ("m", "tokens", "split"),
    [
        (28672, 1, 1),  # 896 tiles; 4 for each of 132 processors run at once
        (8192, 1, 2),
        (4096, 16, 4),
        (128, 1, 16),
        (4096, 4096, 1),
    ],
)
def test_a_sum_is_split_until_the_device_is_full(m: int, tokens: int, split: int) -> None:
    assert tuning.default(m, 16384, tokens, 256, 132).split == split


def test_a_sum_of_few_steps_is_left_whole() -> None:
    assert tuning.default(128, 3 * 256, 1, 256, 132).split == 1
    assert tuning.default(128, 4 * 256, 1, 256, 132).split == 2


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 5000])
def test_every_tile_divides_what_weights_are_filled_up_to(tokens: int) -> None:
    assert all(128 % config.rows == 0 for config in (*CANDIDATES, tuning.default(300, 512, tokens, 64, 1)))


def test_no_tile_is_tried_that_is_mostly_empty() -> None:
    assert {config.tokens for config in tuning.candidates(1)} == {16}
    assert {config.tokens for config in tuning.candidates(40)} == {16, 32, 64}


def test_what_was_measured_is_kept_for_tokens_alike(own_cache: Path) -> None:
    slow, fast = CANDIDATES[3], CANDIDATES[7]
    times = {slow: 2.0, fast: 1.0}
    assert tuning.tune(HERE, tuning.key(64, 512, 20, 128), times.__getitem__, times) == fast
    assert own_cache.is_file()
    assert tuning.choose(HERE, 64, 512, 32, 128) == fast
    assert tuning.choose(HERE, 64, 512, 16, 128) == tuning.default(64, 512, 16, 128, 1)
    tuning.tune(HERE, tuning.key(64, 512, 1, 128), times.__getitem__, times)
    assert tuning.choose(HERE, 64, 512, 32, 128) == fast


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"64x512": [1, 2]}', '{"64x512": [1, 2, 3, 4, "a"]}', '{"64x512": [256, 16, 1, 4, 3]}']
)
def test_a_spoiled_table_is_named(text: str, own_cache: Path) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(text)
    with pytest.raises(RecipeError, match=r"triton-interpreter\.json: is no table of tiles .*; delete it"):
        tuning.choose(HERE, 64, 512, 1, 128)


def test_an_entry_names_five_numbers() -> None:
    assert Config(*CANDIDATES[0]) == CANDIDATES[0]
