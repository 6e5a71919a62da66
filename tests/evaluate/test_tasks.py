"""A task of lm-eval on local data, without a network: our runtime beside transformers' with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquant.errors import RecipeError
from llmquant.evaluate.tasks import Choice, run_tasks, side_by_side
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.linear import QuantLinear
from llmquant.runtime.loader import load

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'llmquant[eval]'")

TASK = """task: fruit
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    fruits = ["apple", "pear", "quince", "medlar", "plum"]
    rows = [
        {
            "question": f"Which fruit has number {i}?",
            "choices": [fruits[i % 5], fruits[(i + 1) % 5], "stone"],
            "answer": i % 3,
        }
        for i in range(24)
    ]
    (path / "fruit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "fruit.yaml").write_text(TASK.format(data=path / "fruit.jsonl"))
    return path


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(tiny_checkpoint, out, Recipe.from_dict({"method": "rtn", "scheme": {"group_size": 32}}))
    return out


def dequantized(packed: Path, original: Path) -> AutoModelForCausalLM:
    """The Hugging Face class, with what our packed weights stand for in its linears."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    for name, linear in load(packed, torch.float32).named_modules():
        if isinstance(linear, QuantLinear):
            eye = torch.eye(linear.in_features, dtype=torch.float32)
            model.get_submodule(name).weight.data = linear(eye).T.contiguous()
    return model


def test_numbers_are_those_of_the_hugging_face_class(
    packed: Path, tiny_checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = run_tasks(packed, Choice(("fruit",), tasks))
    assert found.samples == {"fruit": 24}
    assert "fruit 0-shot" in found.protocol
    theirs = HFLM(
        pretrained=dequantized(packed, tiny_checkpoint), tokenizer=AutoTokenizer.from_pretrained(tiny_checkpoint)
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=["fruit"], task_manager=manager)["results"]["fruit"]
    assert found.scores["fruit"] == {name: expected[f"{name},none"] for name in ("acc", "acc_norm")}
    assert found.errors["fruit"]["acc"] == expected["acc_stderr,none"]
    ((task, metric, value), _) = side_by_side([found])
    assert (task, metric) == ("fruit", "acc")
    assert value.startswith(f"{expected['acc,none']:.4f} ± ")


def test_each_answer_is_as_likely_as_to_the_hugging_face_class(packed: Path, tiny_checkpoint: Path) -> None:
    """Equal scores could be luck; log-likelihoods are not."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    asked = [Instance("loglikelihood", {}, ("Which fruit is it?", f" {answer}"), 0) for answer in ("pear", "a plum")]
    models = load(packed, torch.float32), dequantized(packed, tiny_checkpoint)
    ours, theirs = (
        [value for value, _ in HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(asked, disable_tqdm=True)]
        for model in models
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[0] != ours[1]


def test_unknown_tasks_and_data_that_is_not_there_are_one_line(packed: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--tasks no_such_task: lm-eval knows no such task"):
        run_tasks(packed, Choice(("no_such_task",), tasks))
    (tmp_path / "broken.yaml").write_text(TASK.format(data=tmp_path / "nowhere.jsonl").replace("fruit", "broken"))
    with pytest.raises(RecipeError, match="--tasks broken: ") as caught:
        run_tasks(packed, Choice(("broken",), tmp_path))
    assert "\n" not in str(caught.value)
