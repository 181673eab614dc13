"""A byte-level tokenizer for the tests: every byte a token, a few merges, a chat template."""

from pathlib import Path

# Ids 0 to 2 as in `factories.make_model`: pad, beginning, end.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
MERGES = ("he", "ll", "Ġw", "or")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + len(MERGES)
FIRST_BYTE_ID = len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<s>' + message['role'] + (' ' + message['name'] if message['name'] else '') }}"
    "{{ ': ' + message['content'] + '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '(no thoughts)' }}{% endif %}"
)


def make_tokenizer(
    path: str | Path, chat_template: str | None = CHAT_TEMPLATE, adds_bos: bool = False
) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `path` and return it.

    The token of byte b has id `FIRST_BYTE_ID + b`. With `adds_bos` texts begin with `<s>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *(_byte_symbol(byte) for byte in range(256)), *MERGES]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_template,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    path = Path(path)
    tokenizer.save_pretrained(path)
    return path


def byte_ids(data: bytes) -> list[int]:
    """Token ids that decode to these bytes, one for each."""
    return [FIRST_BYTE_ID + byte for byte in data]


def _byte_symbol(byte: int) -> str:
    """The printable character that stands for a byte in byte-level BPE (the GPT-2 table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    others = [b for b in range(256) if b not in printable]
    return chr(256 + others.index(byte))
