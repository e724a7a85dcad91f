"""A GGUF file of SmolLM2 becomes a plain checkpoint in float32: weights, tokenizer, chat template, generation config.

transformers reads the tensors. It leaves three things as a quantised checkpoint has them, which are put right here:
`quantization_config` goes, because the weights are plain numbers again; the pre-tokenizer is SmolLM2's own, which splits
every number into its digits; and generation ends at `<|im_end|>`, with which the chat template ends a turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfplay.errors import InputError
from selfplay.storage import folders

ARCHITECTURE, PRE_TOKENIZER = "llama", "smollm"
END_OF_TURN = "<|im_end|>"


def convert(gguf: Path, out: Path) -> None:
    """Write the checkpoint of a GGUF file to the folder `out`, which must not exist. Raises InputError.

    The file has to have the architecture Llama and the tokenizer of SmolLM, in whatever quantisation and size.
    """
    require_smollm2(gguf)
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = _tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.eos_token_id = model.config.pad_token_id = end
    model.hf_quantizer = None  # without one the weights are saved as the numbers that they are
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    with folders.folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def require_smollm2(gguf: Path) -> None:
    """Raise InputError unless the file is a GGUF of SmolLM2."""
    fields = _fields(gguf)
    for key, what, wanted in (
        ("general.architecture", "architecture", ARCHITECTURE),
        ("tokenizer.ggml.pre", "pre-tokenizer", PRE_TOKENIZER),
    ):
        if fields.get(key) != wanted:
            raise InputError(
                f"{gguf} has the {what} {fields.get(key)!r}; SmolLM2 has {wanted!r}, and no other is converted",
                "give a GGUF file of SmolLM2-Instruct, or convert other models with transformers yourself",
            )
    if not fields.get("tokenizer.chat_template"):
        raise InputError(f"{gguf} has no chat template", "give the file of an instruct model")


def _fields(gguf: Path) -> dict[str, Any]:
    """The texts in the header of a GGUF file. Raises InputError for another file."""
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError:
        raise InputError("a GGUF file is read by the package gguf", "pip install -e '.[gguf]'") from None
    try:
        found = GGUFReader(gguf).fields
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{gguf} is no GGUF file that can be read: {error}") from None
    return {key: field.contents() for key, field in found.items() if field.types == [GGUFValueType.STRING]}


def _tokenizer(gguf: Path) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    return tokenizer
