"""A real byte-level BPE tokenizer, small enough for tiny models."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The quick brown fox jumps over the lazy dog and reads a book.",
    "Readers skip some of the words, and models can skip some of the layers.",
    "人们读书的时候会跳过一些词，模型也可以跳过一些层。",
    "读书破万卷，下笔如有神。",
)
END = "<eos>"


def small_tokenizer(size: int = 300) -> Tokenizer:
    """256 bytes, END, and the commonest merges: a rare Chinese character takes three tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def saveable_tokenizer(chat: bool = False, size: int = 300) -> PreTrainedTokenizerFast:
    """The same with save_pretrained."""
    made = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(size), eos_token=END)
    if chat:
        made.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
    return made
