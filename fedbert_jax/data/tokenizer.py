"""Loads and saves a tokenizer, and tells what its tokens are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbert_jax.data.vocabulary import CONTINUES, MAX_LENGTH, SPECIAL_TOKENS
from fedbert_jax.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, so functions import it when they need it
    from transformers import PreTrainedTokenizerFast


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids of all special tokens, increasing; raises UserError unless [CLS], [SEP] and [MASK] are there."""
    named = {"[CLS]": tokenizer.cls_token_id, "[SEP]": tokenizer.sep_token_id, "[MASK]": tokenizer.mask_token_id}
    missing = [name for name, index in named.items() if index is None]
    if missing:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}; BERT's training needs it.")
    return tuple(sorted(set(map(int, tokenizer.all_special_ids))))


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns V, one more than the largest token id, added tokens included."""
    return int(max(tokenizer.get_vocab().values())) + 1


def token_dtype(size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Returns the dtype that stores ids of a vocabulary of `size` tokens: uint16 up to 65,536, then int32."""
    return np.dtype(np.uint16) if size <= 2**16 else np.dtype(np.int32)


def continuation_mask(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Returns bool [V], true where a token continues a word; raises UserError if none does (no WordPiece)."""
    mask = np.zeros(vocab_size(tokenizer), dtype=bool)
    mask[[index for token, index in tokenizer.get_vocab().items() if token.startswith(CONTINUES)]] = True
    if not mask.any():
        raise UserError(
            "mlm.whole_word=True needs a WordPiece tokenizer, in which tokens that continue a word begin with "
            f"{CONTINUES!r}; {tokenizer.name_or_path!r} has none."
        )
    return mask


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a directory or the hub.

    Raises:
      UserError: if there is none, or it lacks a fast (`tokenizers`) form, a vocabulary, or [CLS], [SEP] or [MASK].
    """
    path = os.path.expanduser(name_or_path)
    if path.startswith(("/", ".")) and not os.path.isdir(path):  # can't be a hub name
        raise UserError(f"data.tokenizer={name_or_path!r}: there is no such directory.")
    if _has_vocabulary_only(path):
        return _from_vocabulary(os.path.join(path, "vocab.txt"))
    try:
        tokenizer: Any = _loader(path).from_pretrained(path)
    except Exception as error:  # loaders raise whatever their formats raise
        kind = "in this directory" if os.path.isdir(path) else "as a directory or on the hub"
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"data.tokenizer={name_or_path!r}: no tokenizer could be loaded {kind}: {reason}.") from error
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer={name_or_path!r} has no fast form; accepted: one with a tokenizer.json.")
    # For a BERT directory without vocab.txt and tokenizer.json, transformers 5 makes one that knows only special tokens.
    if len(tokenizer) <= len(special_ids(tokenizer)):
        raise UserError(f"data.tokenizer={name_or_path!r} has no vocabulary: neither tokenizer.json nor vocab.txt is there.")
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def _loader(path: str) -> Any:
    """Returns the class that loads a tokenizer; the plain one saves a second of imports."""
    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file() and '"tokenizer_class": "PreTrainedTokenizerFast"' in settings.read_text(errors="replace"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _has_vocabulary_only(path: str) -> bool:
    """Tells whether a directory holds vocab.txt but nothing on how to use it; transformers 5 doesn't load that by itself."""
    settings = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    there = set(os.listdir(path)) if os.path.isdir(path) else set()
    return "vocab.txt" in there and there.isdisjoint(settings)


def _from_vocabulary(file: str) -> PreTrainedTokenizerFast:
    """Returns BERT's WordPiece over the lines of vocab.txt, which folds case unless a word there has a capital letter."""
    from transformers import BertTokenizer

    try:
        with open(file, encoding="utf-8") as lines:
            tokens = [line.rstrip("\r\n") for line in lines]
    except ValueError as error:
        raise UserError(f"{file} is not UTF-8; accepted: one token a line.") from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}; if it is no BERT's, add its tokenizer.json to the directory.")
    cased = any(token != token.lower() for token in tokens if not (token.startswith("[") and token.endswith("]")))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=not cased, model_max_length=MAX_LENGTH)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a tokenizer so that `AutoTokenizer.from_pretrained` of transformers 4 and 5 loads it as it is."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4, for:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
