"""From durable layers to a checkpoint directory. config.json, without which no loader opens it, comes last."""

import hashlib
import platform
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from llmquant.calibration.batches import Calibration
from llmquant.card import origin_of
from llmquant.checkpoint import durable
from llmquant.checkpoint.journal import WORK, Journal
from llmquant.checkpoint.parts import lazy_tensors
from llmquant.checkpoint.reader import Checkpoint
from llmquant.checkpoint.writer import TensorSource, copy_file, json_bytes, write_json, write_shard
from llmquant.errors import OutputError, VerifyError
from llmquant.manifest import ATTEMPTS, LOG, MANIFEST, MIXTURE, RECIPE, REPORT, manifest_bytes, read_manifest, sealed
from llmquant.memory import peak
from llmquant.plan import Plan, quantization_config, spec_bytes
from llmquant.verify import problems_of, verify_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def check_output(out: Path, source: Path) -> None:
    """Refuse an output directory before any work.

    Raises:
        OutputError: it is or contains the input, lies in it, is no directory, or holds foreign files.
    """
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"{out}: output and input {source} lie in one another; choose another -o")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is not a directory; choose another -o")
    ours = (out / WORK).is_dir() or (out / MANIFEST).is_file()
    if out.exists() and not ours and any(out.iterdir()):
        raise OutputError(f"{out}: holds files that llmquant did not make; choose an empty directory")


def already_finished(out: Path, fingerprint: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether `out` is this very run, finished and still whole; a killed script may safely be run again.

    With `overwrite`, whatever finished checkpoint is there is removed, and the answer is no.

    Raises:
        OutputError: `out` holds a finished checkpoint of another run.
        VerifyError: it is this run's, but damaged.
    """
    if (out / WORK).is_dir() or not (out / MANIFEST).is_file():
        return False
    if overwrite:
        _remove(out, ["config.json", *read_manifest(out), LOG, ATTEMPTS, REPORT, MANIFEST])
        return False
    if not (out / LOG).is_file() or digest_of(fingerprint).encode() not in (out / LOG).read_bytes().partition(b"\n")[0]:
        raise OutputError(f"{out}: holds a finished checkpoint of another run; use --overwrite to replace it")
    verify_checkpoint(out)
    durable.sweep(out)  # a run killed while it removed its journal leaves the rest of it
    return True


def digest_of(fingerprint: dict[str, Any]) -> str:
    """What the log of a finished directory says of the run that made it."""
    return hashlib.sha256(json_bytes(fingerprint)).hexdigest()


def clear(out: Path) -> None:
    """Remove what an earlier run left in a directory whose journal begins anew; config.json first."""
    weights = sorted(path.name for path in out.glob("model*.safetensors"))
    _remove(out, ["config.json", MANIFEST, LOG, RECIPE, INDEX, MIXTURE, REPORT, *weights])


def _remove(out: Path, names: list[str]) -> None:
    with durable.reported(out):
        for name in names:
            if (out / name).exists():
                durable.remove(out / name)


def finish(
    out: Path,
    plan: Plan,
    calibration: Calibration | None,
    fingerprint: dict[str, Any],
    source: Checkpoint,
    journal: Journal,
    since: float,
) -> None:
    """Make a whole of the units' shards, and verify it before the journal goes.

    The run's `fingerprint` goes into the log, and how long it took: its units, and all `since` then, by `perf_counter`.

    Every step can be repeated, so that a run killed here finishes the same way.

    Raises:
        VerifyError: the directory is not as planned; it is left without config.json.
    """
    digests = _weights(out, plan, journal)
    digests |= {name: copy_file(source.root / name, out / name) for name in source.side_files()}
    config = source.config | {"quantization_config": quantization_config(plan)}
    if plan.recipe.format == "gptq":  # where older loaders look
        digests["quantize_config.json"] = write_json(out / "quantize_config.json", config["quantization_config"])
    digests[RECIPE] = durable.write_file(out / RECIPE, [plan.recipe.to_yaml().encode()])
    digests["config.json"] = hashlib.sha256(json_bytes(config)).hexdigest()
    run = _run_facts(plan, fingerprint, journal, since)
    durable.write_file(out / LOG, [sealed(_log_lines(plan, source, calibration, run, journal))])
    durable.write_file(out / MANIFEST, [manifest_bytes(digests)])
    write_json(out / "config.json", config)
    if problems := problems_of(out):
        with durable.reported(out):
            durable.remove(out / "config.json")
        raise VerifyError(f"{out}: {problems[0]}; {len(problems)} problems in all, start anew with --no-resume")
    journal.discard()  # and with it the parts that were merged


def _weights(out: Path, plan: Plan, journal: Journal) -> dict[str, str]:
    """The final weight files and their digests: one merged file, or the shards as they are and an index."""
    shards = [shard for unit in plan.units for shard in unit.shards]
    if plan.merged:
        tensors: dict[str, TensorSource] = {}
        for shard in shards:
            tensors |= lazy_tensors(out / shard.file)
        return {SINGLE: write_shard(out / SINGLE, tensors)}
    digests: dict[str, str] = {}
    for record in journal.records:
        digests |= record["shards"]
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(spec_bytes(spec) for shard in shards for spec in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return digests | {INDEX: write_json(out / INDEX, index)}


def _run_facts(plan: Plan, fingerprint: dict[str, Any], journal: Journal, since: float) -> dict[str, Any]:
    """What all processes of a run took, but for what was lost with a unit, and where the last one was."""
    return {
        "fingerprint": digest_of(fingerprint),
        "environment": {
            **{f"{package} version": version for package, version in fingerprint["versions"].items()},
            "Python version": platform.python_version(),
            "system": platform.platform(),
            **fingerprint["machine"],
        },
        "run": {
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(sum(record["seconds"] for record in journal.records) + perf_counter() - since, 1),
            "peak_memory": max(peak(), *(record["peak_memory"] for record in journal.records)),
            "planned_memory": plan.estimate.memory,
            "bytes_in": plan.bytes_in,
        },
    }


def _log_lines(
    plan: Plan, source: Checkpoint, calibration: Calibration | None, run: dict[str, Any], journal: Journal
) -> list[dict[str, Any]]:
    """The run's records: one line for the whole, one per module, one per trained layer."""
    tokens = calibration.tokens if calibration else {}
    notes = [*plan.notes, *(calibration.notes if calibration else ())]
    head = run | {
        "origin": {"model_type": plan.model_type, **origin_of(source.root)},
        "calibration_tokens": tokens,
        "sequences": calibration.sequences if calibration else 0,
        "notes": notes,
    }
    lines = [head]
    for record in journal.records:
        lines += record["modules"]
        if "training" in record:
            lines.append({"layer": record["unit"], "training": record["training"]})
    return lines
