"""A checkpoint as ModelOpt exports it, for TensorRT-LLM."""

from llmquant.convert.packed import tensor_files
from llmquant.convert.product import Product, json_file, side_files
from llmquant.convert.source import Source
from llmquant.errors import CheckpointError, RecipeError
from llmquant.formats import modelopt
from llmquant.formats.checks import check_in_place

NOTE = "written by TensorRT-LLM's definition of the layout, and never loaded in it by us"


def product(source: Source) -> Product:
    """Weights, tokenizer, hf_quant_config.json and config.json.

    Raises:
        CheckpointError: the source is not quantized.
        RecipeError: a scheme that the layout does not have, several schemes, or act-order.
    """
    if not source.schemes:
        raise CheckpointError(f"{source.checkpoint.root}: is not quantized; run llmquant quantize first")
    for name, scheme in source.schemes.items():
        if reason := modelopt.refuse(*source.linears[name], scheme):
            raise RecipeError(f"{name}: modelopt cannot hold it: {reason}")
        check_in_place(name, source.order(name), modelopt.NAME)
    skipped = [name for name in source.linears if name not in source.schemes]
    plain = {key: value for key, value in source.checkpoint.config.items() if key != "quantization_config"}
    files = tensor_files(source, modelopt) | side_files(source)
    files["hf_quant_config.json"] = json_file(modelopt.config_block(source.schemes, skipped))
    files["config.json"] = json_file(plain)
    return Product(files, (NOTE,))
