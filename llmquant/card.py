"""The model card of a finished directory: what the Hub shows, and what of it is known for certain.

Of the original model the run log keeps where it came from and what its own card said of licence and language.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from llmquant.checkpoint.source import hub_origin
from llmquant.checkpoint.strict_json import parse_object
from llmquant.errors import CheckpointError
from llmquant.manifest import LOG, MANIFEST, RECIPE
from llmquant.recipe import Recipe
from llmquant.version import __version__

CARD = "README.md"
EVALUATION = "llmquant_eval.json"  # what `llmquant eval DIR --json` printed, put beside the weights
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")

USE = """## Use

```console
$ vllm serve {name}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")    # with {package}
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`import llmquant` before that runs the packed weights by llmquant's own kernels, without that package; so does
`vllm serve {name} --quantization llmquant`. For llama.cpp, `llmquant convert --to gguf` keeps the integers.

`sha256sum -c {manifest}` and `llmquant verify` check the files.
"""
PACKAGES = {
    "compressed-tensors": "the package compressed-tensors installed",
    "gptq": "the packages optimum and gptqmodel installed",
    "awq": "the packages gptqmodel and accelerate installed",
}


def origin_of(root: Path) -> dict[str, Any]:
    """What the run log keeps of the original model: its name on the Hub and commit, and of its card what is CARRIED."""
    found = hub_origin(root)
    path = root / CARD
    if path.is_file():
        try:
            stated = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, yaml.YAMLError):  # a card that nobody can read says nothing
            stated = {}
        found |= {key: stated[key] for key in CARRIED if isinstance(stated.get(key), str | list)}
    return found


def model_card(directory: Path, name: str, base_model: str | None = None) -> str:
    """The card of a directory that `verify` has passed, as the repository `name`.

    Raises:
        CheckpointError: the figures beside the weights are no JSON object.
    """
    head = json.loads((directory / LOG).read_bytes().partition(b"\n")[0])
    config = parse_object((directory / "config.json").read_bytes(), directory / "config.json")
    method = config["quantization_config"]["quant_method"]
    origin = head.get("origin", {})
    base = base_model or origin.get("name")
    recipe = Recipe.from_yaml(directory / RECIPE) if (directory / RECIPE).is_file() else None
    metadata: dict[str, Any] = {key: origin[key] for key in CARRIED if key in origin}
    if base:
        metadata |= {"base_model": base, "base_model_relation": "quantized"}
    bits = [f"{recipe.scheme.bits}-bit", f"int{recipe.scheme.bits}"] if recipe else []
    metadata |= {"library_name": "transformers", "tags": ["llmquant", method, *bits]}
    metadata.setdefault("pipeline_tag", "image-text-to-text" if "vision_config" in config else "text-generation")
    parts = [
        f"---\n{ModelCardData(**metadata).to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        _made(base, origin, recipe),
        _quality(directory),
        USE.format(name=name, package=PACKAGES.get(method, method), manifest=MANIFEST).rstrip(),
        _run(head, recipe),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(base: str | None, origin: dict[str, Any], recipe: Recipe | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else f"A {origin.get('model_type', 'language')} model"
    commit = f" (commit {origin['commit'][:12]})" if base and origin.get("commit") else ""
    how = f" to {recipe.scheme} by the method `{recipe.method}`" if recipe else ""
    return f"{of}{commit}, quantized{how} with llmquant {__version__}."


def _quality(directory: Path) -> str:
    """Figures that were measured, with their protocol, or the sentence that there are none."""
    path = directory / EVALUATION
    if not path.is_file():
        return "## Quality\n\nNot measured. `llmquant eval` measures perplexity, and KL divergence from the original."
    facts = parse_object(path.read_bytes(), path)
    figures = {key: value for key, value in facts.items() if type(value) in (int, float)}
    if not figures:
        raise CheckpointError(f"{path}: holds no figures; write it by `llmquant eval DIR --json > {path}`")
    rows = [f"| {key.replace('_', ' ')} | {value:.5g} |" for key, value in figures.items()]
    return "\n".join(["## Quality", "", "| | |", "|---|---|", *rows, "", str(facts.get("protocol", ""))]).rstrip()


def _run(head: dict[str, Any], recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    lines = ["## How it was made", ""]
    if tokens := head.get("calibration_tokens"):
        sources = ", ".join(f"{count} from {source}" for source, count in tokens.items())
        lines += [f"Calibration tokens: {sources}, in {head.get('sequences')} sequences.", ""]
    lines += [f"- {note}" for note in head.get("notes", [])]
    return "\n".join([*lines, "", "```yaml", recipe.to_yaml().rstrip(), "```"])
