"""The world's own tokenizer: one id a word."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from adhere.toy.stories import vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level over the world's vocabulary; decoding joins words with spaces."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}, unk_token=SPECIAL[3]))
    core.pre_tokenizer = WhitespaceSplit()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk, model_max_length=512
    )
