"""The WordPiece tokenizer: loaded or trained, and text to token ids with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fedbert_jax.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, so functions import it when they need it
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of a tokenizer trained here
CONTINUES = "##"  # the prefix of a token that continues a word
MAX_LENGTH = 512  # BERT's, for users of the saved tokenizer; nothing here truncates
MAX_ALPHABET = 1000  # characters of a trained vocabulary, as in `tokenizers`; rarer ones become [UNK]


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids of all special tokens, increasing; raises UserError unless [CLS], [SEP] and [MASK] are there."""
    named = {"[CLS]": tokenizer.cls_token_id, "[SEP]": tokenizer.sep_token_id, "[MASK]": tokenizer.mask_token_id}
    missing = [name for name, index in named.items() if index is None]
    if missing:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}; BERT's training needs it."
        )
    return tuple(sorted(set(map(int, tokenizer.all_special_ids))))


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns V, one more than the largest token id, added tokens included."""
    return int(max(tokenizer.get_vocab().values())) + 1


def token_dtype(size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Returns the type that stores ids of a vocabulary of `size` tokens: uint16 up to 65,536, then int32."""
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
      UserError: if there is none, it has no fast (`tokenizers`) form, no vocabulary, or lacks [CLS], [SEP] or [MASK].
    """
    from transformers import AutoTokenizer

    path = os.path.expanduser(name_or_path)
    if path.startswith(("/", ".")) and not os.path.isdir(path):  # what a hub's name can't be
        raise UserError(f"data.tokenizer={name_or_path!r}: there is no such directory.")
    if _has_vocabulary_only(path):
        return _from_vocabulary(os.path.join(path, "vocab.txt"))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # loaders raise what their formats raise
        kind = "in this directory" if os.path.isdir(path) else "as a directory or on the hub"
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"data.tokenizer={name_or_path!r}: no tokenizer could be loaded {kind}: {reason}.") from error
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer={name_or_path!r} has no fast form; accepted: one with a tokenizer.json.")
    # For a BERT directory without vocab.txt and tokenizer.json, transformers 5 makes one that knows its specials only.
    if len(tokenizer) <= len(special_ids(tokenizer)):
        raise UserError(
            f"data.tokenizer={name_or_path!r} has no vocabulary: neither tokenizer.json nor vocab.txt is there."
        )
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def _has_vocabulary_only(path: str) -> bool:
    """Tells whether a directory holds vocab.txt and nothing on how to use it; transformers 5 loads none such by itself."""
    settings = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    there = set(os.listdir(path)) if os.path.isdir(path) else set()
    return "vocab.txt" in there and there.isdisjoint(settings)


def _from_vocabulary(file: str) -> PreTrainedTokenizerFast:
    """Returns BERT's WordPiece over the lines of vocab.txt: it folds case, unless a word there has a capital letter."""
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


def train_tokenizer(texts: Iterable[str], size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    """Trains BERT's tokenizer (Devlin et al. 2019; Hugging Face's BPE-style WordPiece trainer) on the texts.

    The same texts give the same vocabulary in every process. `tokenizers` alone does not: it numbers the `##x`
    characters in the order of a randomly seeded hash map, and breaks ties between merges by those numbers. So the
    alphabet is counted here and handed over as reserved tokens in a fixed order, which leaves the trainer no choice.

    Args:
      texts: what to learn from.
      size: number of tokens wanted, the five special tokens included; fewer if the texts have too few words.
      lowercase: fold case and strip accents.

    Raises:
      UserError: if the texts hold no word.
    """
    from transformers import BertTokenizer

    texts = list(texts)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    starts, continues = _count_characters(texts, normalizer)
    if not starts:
        raise UserError("data.tokenizer='train:...': there is no text to train a tokenizer on.")
    ranked = sorted(starts | continues, key=lambda c: (-starts[c] - continues[c], c))
    # A small vocabulary would drown in rare characters; 28 with their ## forms still leave room in one of 64 tokens.
    alphabet = sorted(ranked[: min(MAX_ALPHABET, max(28, size // 16))])
    reserved = [*SPECIAL_TOKENS, *alphabet, *(CONTINUES + c for c in alphabet if c in continues)]

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=reserved, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUES, show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(texts, trainer)
    vocabulary = trained.get_vocab(with_added_tokens=False)
    in_order = {token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.__getitem__)}
    # Built anew from the vocabulary, because the trainer made every reserved token a special one.
    return BertTokenizer(vocab=in_order, do_lower_case=lowercase, model_max_length=MAX_LENGTH)


def _count_characters(texts: Iterable[str], normalizer: normalizers.Normalizer) -> tuple[Counter[str], Counter[str]]:
    """Counts the characters that start a word and those that continue one, as BERT's tokenizer divides the texts."""
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    starts: Counter[str] = Counter()
    continues: Counter[str] = Counter()
    # Once for each different piece between spaces: a tenth of the work, since words never cross a space.
    for piece, count in Counter(piece for text in texts for piece in text.split()).items():
        for word, _ in split(normalizer.normalize_str(piece)):
            starts[word[0]] += count
            for character in word[1:]:
                continues[character] += count
    return starts, continues


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 1_000_000) -> Iterator[np.ndarray]:
    """Yields the token ids of each text: [n] uint16 or int32 (`token_dtype`), without special tokens added.

    Text that spells a special token ("[MASK]" in documentation) is read as text, never as that token.

    Args:
      tokenizer: any fast tokenizer.
      texts: texts of any length; nothing is truncated.
      batch: about how many characters are encoded at a time, on all cores.
    """
    dtype = token_dtype(vocab_size(tokenizer))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, whose settings may be changed
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def flush(pending: list[str]) -> Iterator[np.ndarray]:
        for encoding in backend.encode_batch_fast(pending, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=dtype)

    pending: list[str] = []
    characters = 0
    for text in texts:
        pending.append(text)
        characters += len(text)
        if characters >= batch:
            yield from flush(pending)
            pending, characters = [], 0
    yield from flush(pending)
