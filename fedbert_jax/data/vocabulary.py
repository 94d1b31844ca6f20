"""Trains a WordPiece tokenizer on a run's text: its alphabet and vocabulary, for text of any script."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fedbert_jax.data.words import IDEOGRAPHS, KANA, PICTURES, UNSPACED, cut
from fedbert_jax.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, so functions import it when they need it
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of a tokenizer trained here
CONTINUES = "##"  # the prefix of a token that continues a word
MAX_LENGTH = 512  # BERT's, for users of the saved tokenizer; nothing here truncates
LONGEST_WORD = 100  # characters; WordPiece makes [UNK] of a longer word, here as in BERT

NO_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"  # characters that Python takes for spaces, and that BERT's tokenizer drops
_SPACES = re.compile(r"[ \t\r\n]+")
_ASCII_WORDS = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")  # what the splitter finds, in a fifth of the time
_PIECE = 100_000  # characters of a text that are looked at together; the library takes 100 bytes for each
# Without a character, all words that have it are [UNK]; without a merge, its words are one token longer. So if there is room
# for only one of the two, the character gets it even if it occurs less often by this factor. The first half of the
# vocabulary is given away easily, the other half only if there is little else to learn, as in Chinese.
_WORTH, _WORTH_PAST_HALF = 32, 8
# What data.lowercase drops: accents of letters that are often written without them, and the vowel points of Hebrew and
# Arabic. All other marks stay, since dropping the vowels of Thai or Hindi would make different words.
_ACCENTS = (
    "(?<=[\\p{Latin}\\p{Greek}\\p{Cyrillic}])\\p{Mn}+"
    "|[\\p{Mn}&&[\u0591-\u05c7\u0610-\u061a\u064b-\u0652\u0670\u06d6-\u06ed]]"
)
# Words of their own, besides BERT's: up to 24 syllables of Korean, decomposed; as many letters (with their marks) of a
# script without spaces, since a run of more than 100 would be [UNK]; a symbol or emoji with its modifiers.
_WORDS = (
    "(?:[\u1100-\u115f]{1,2}[\u1160-\u11a7]{1,2}[\u11a8-\u11ff]{0,2}){1,24}"
    f"|(?:[{UNSPACED}{KANA}\u1100-\u11ff\U00020000-\U000323af]\\p{{M}}{{0,3}}){{1,24}}"
    f"|[[\\p{{S}}&&[^\\x00-\\x7f]]{PICTURES}][\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff]{{0,3}}"
)


def train_tokenizer(
    texts: Iterable[str], size: int, lowercase: bool, count: Callable[[int], None] = lambda _: None
) -> PreTrainedTokenizerFast:
    """Trains BERT's tokenizer (Devlin et al. 2019; Hugging Face's BPE-style WordPiece trainer) on the texts.

    It differs from BERT's for scripts that BERT's own destroys. Text is decomposed (NFD): an accent is a character of its
    own, and so is each part of a Korean syllable. `lowercase` drops only those marks that writers may leave out
    (`_ACCENTS`). Thai and similar scripts are cut into words of at most 24 letters, and each symbol is a word.

    The same texts give the same vocabulary in every process. `tokenizers` alone does not ensure that: it numbers the `##x`
    characters in the order of a randomly seeded hash map, and breaks ties between merges by those numbers. So the
    alphabet is counted here and handed over as reserved tokens in a fixed order, which leaves the trainer no choice.

    Args:
      texts: what to learn from; words of more than `LONGEST_WORD` letters are left out.
      size: number of tokens wanted, including the five special tokens; fewer if the texts have too few words.
      lowercase: fold case and drop accents.
      count: called with the number of characters of the texts that the trainer has taken so far.

    Raises:
      UserError: if the texts hold no word.
    """
    normalizer, splitter = _normalizer(lowercase), _splitter()
    pieces, parts = _count_parts((piece for text in texts for piece in cut(text, _PIECE, anywhere=True)), normalizer)
    words = _count_words(parts, normalizer, splitter)
    if not words:
        raise UserError("data.tokenizer='train:...': there is no text to train a tokenizer on.")
    starts, continues = _count_characters(words)
    ranked = sorted(starts | continues, key=lambda c: (-starts[c] - continues[c], c))
    counts = [starts[c] + continues[c] for c in ranked]
    forms = [1 + (c in continues) for c in ranked]
    alphabet = sorted(ranked[: _alphabet_size(counts, forms, words, size)])
    reserved = [*SPECIAL_TOKENS, *alphabet, *(CONTINUES + c for c in alphabet if c in continues)]

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=reserved,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    trained.train_from_iterator(_counted(pieces, count), trainer)
    vocabulary = trained.get_vocab(with_added_tokens=False)
    in_order = {token: index for index, token in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}
    known = set(alphabet)
    for character in ranked:  # if the texts have too few words for `size`, there is room for rare characters
        new = [character] + [CONTINUES + character] * (character in continues)
        if character not in known and len(in_order) + len(new) <= size:
            in_order |= {token: len(in_order) + n for n, token in enumerate(new)}
    # Built anew from the vocabulary, because the trainer made every reserved token a special one.
    return _wordpiece(in_order, normalizer, splitter)


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    steps = [normalizers.BertNormalizer(strip_accents=False, lowercase=lowercase), normalizers.NFD()]
    return normalizers.Sequence(steps + [normalizers.Replace(Regex(_ACCENTS), "")] * lowercase)


def _splitter() -> pre_tokenizers.PreTokenizer:
    # BERT's comes last: the pattern would otherwise search each word by itself, which takes four times as long.
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.BertPreTokenizer()])


def _wordpiece(
    vocabulary: dict[str, int], normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that treats pairs and special tokens as BERT's does.

    It is not a `BertTokenizer`, since that class, when loaded, replaces the saved normalizer with its own.
    """
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordPiece(
            vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD, continuing_subword_prefix=CONTINUES
        )
    )
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = decoders.WordPiece(prefix=CONTINUES)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


# --- the alphabet ----------------------------------------------------------------------------------------------------


def _alphabet_size(counts: Sequence[int], forms: Sequence[int], words: Counter[str], size: int) -> int:
    """Returns how many of the ranked characters get a place in a vocabulary of `size`, see `_WORTH`.

    Args:
      counts: how often each character occurs, in falling order.
      forms: how many tokens each takes: 1, or 2 if it also continues words.
      words: how often each word occurs. A word of n characters counts as n - 1 merges as frequent as itself.
      size: number of tokens.
    """
    often = np.array(sorted(words.values(), reverse=True))
    merges = np.cumsum([len(word) - 1 for word, _ in sorted(words.items(), key=lambda item: -item[1])])
    room = size - len(SPECIAL_TOKENS)
    for place, (count, cost) in enumerate(zip(counts, forms, strict=True)):
        room -= cost
        excluded = np.searchsorted(merges, room, side="right")  # the word of the best merge that has no room
        merge = int(often[excluded]) if room >= 0 and excluded < len(often) else 0
        worth = _WORTH if room >= size // 2 else _WORTH_PAST_HALF
        if room < 0 or count * worth < merge:
            return place
    return len(counts)


def _count_parts(texts: Iterable[str], normalizer: normalizers.Normalizer) -> tuple[list[str], Counter[str]]:
    """Returns the texts without their long words, and how often each distinct part between spaces occurs."""
    kept: list[str] = []
    frequencies: Counter[str] = Counter()
    for text in texts:
        parts = text.split()
        if max(map(len, parts), default=0) > LONGEST_WORD or any(c in text for c in NO_SPACES):
            text = " ".join(_without_long_words(part, normalizer) for part in _SPACES.split(text))
            parts = text.split()
        kept.append(text)
        frequencies.update(parts)
    return kept, frequencies


def _count_words(
    frequencies: Counter[str], normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer
) -> Counter[str]:
    """Counts the words as the tokenizer sees them; it splits each distinct part once, since words never cross a space."""
    alike: dict[tuple[int, bool], list[str]] = {}
    for part, count in frequencies.items():
        alike.setdefault((count, part.isascii()), []).append(part)
    words: Counter[str] = Counter()
    for (count, ascii), parts in alike.items():  # all equally frequent parts together
        for joined in cut(" ".join(parts), _PIECE, anywhere=True):
            text = normalizer.normalize_str(joined)
            found = _ASCII_WORDS.findall(text) if ascii else (word for word, _ in splitter.pre_tokenize_str(text))
            for word, times in Counter(found).items():
                words[word] += count * times
    return words


def _count_characters(words: Counter[str]) -> tuple[Counter[str], Counter[str]]:
    """Counts the characters that start a word and those that continue one."""
    starts: Counter[str] = Counter()
    continues: Counter[str] = Counter()
    for word, count in words.items():
        starts[word[0]] += count
        for character in word[1:]:
            continues[character] += count
    return starts, continues


def _counted(pieces: Iterable[str], count: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        count(done)


# --- words that are too long -----------------------------------------------------------------------------------------


def _without_long_words(text: str, normalizer: normalizers.Normalizer) -> str:
    """Returns the text without words that can only be [UNK]; the trainer's time grows as the square of their length."""

    def short(match: re.Match[str]) -> str:
        word = match[0]
        # Without its accents it may be short enough. A far longer word with so many accents isn't worth the time.
        return word if len(word) < 100 * LONGEST_WORD and len(normalizer.normalize_str(word)) <= LONGEST_WORD else " "

    return _long_words().sub(short, text) if len(text) > LONGEST_WORD else text


@functools.cache
def _long_words() -> re.Pattern[str]:
    """Returns a pattern for runs of more than `LONGEST_WORD` characters that the tokenizer cuts nowhere."""
    others = map(chr, range(0x80, 0x10000))  # with many characters beyond these, Python's classes are slow
    between = "\t\n\r" + "".join(c for c in map(chr, range(32, 127)) if not c.isalnum())
    between += "".join(c for c in others if unicodedata.category(c)[0] in "PSZ")
    letter = f"[^{re.escape(between)}{IDEOGRAPHS}{UNSPACED}{KANA}{PICTURES}\u1100-\u11ff\uac00-\ud7a3]"
    return re.compile(f"(?<!{letter}){letter}{{{LONGEST_WORD + 1},}}")
