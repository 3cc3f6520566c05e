"""A word-level tokenizer for the demo's small models: every word of the generated captions is one token."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BEGIN, IMAGE, END = "[PAD]", "[UNK]", "[BOS]", "<image>", "[EOS]"

# Captions of users' videos contain words that the generated ones do not. Adding the most frequent ones costs nothing.
COMMON_WORDS = ("a", "an", "the", "of", "on", "in", "over", "and", "is", "with", "to", "photo", "video", "picture")


def _splitter() -> pre_tokenizers.PreTokenizer:
    """Split text into words, including hyphenated ones (`two-tone`), and single punctuation marks."""
    return pre_tokenizers.Split(Regex(r"\w+(?:-\w+)*|[^\w\s]"), behavior="removed", invert=True)


def collect_words(texts: Iterable[str]) -> list[str]:
    """All words and punctuation marks in `texts`, and the common words, in lower case, sorted."""
    split = _splitter()
    words = {word for text in set(texts) for word, _ in split.pre_tokenize_str(text.lower())}
    return sorted(words | set(COMMON_WORDS))


def build_tokenizer(words: Sequence[str], *, add_end: bool) -> PreTrainedTokenizerFast:
    """A fast Hugging Face tokenizer over `words`.

    Args:
        words: the vocabulary without special tokens.
        add_end: append [EOS], at which CLIP pools, to every text; otherwise only [BOS] is prepended, as in the prompt
            of a language model.

    [EOS] has the largest id, so that pooling at the largest id (OpenAI's CLIP) and pooling at [EOS] are equivalent. The
    maximum length includes the special tokens, so a truncated text still ends in [EOS].
    """
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, BEGIN, IMAGE, *words, END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if add_end else f"{BEGIN} $A",
        special_tokens=[(token, vocabulary[token]) for token in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and its configuration to `folder`."""
    tokenizer.save_pretrained(str(folder))
