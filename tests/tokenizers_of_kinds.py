"""Small byte-level tokenizers with the conventions of known families; what they should give is asked of transformers, not of the code under test."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

GEMMA_CHAT = (
    "{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ 'model' if turn['role'] == 'assistant' else turn['role'] }}\n"
    "{{ turn['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nothing ends an answer.
BARE_CHAT = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _made(special, single, template, **roles):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if single:
        ids = [(token, tokenizer.token_to_id(token)) for token in special if token in single]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in roles.items()})
    found.chat_template = template
    return found


def gemma():
    """BOS before a text, BOS in the chat template, turns that end with a token that is not the end token."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    return _made(special, "<bos> $A", GEMMA_CHAT, bos="<bos>", eos="<eos>", pad="<pad>")


def chatml():
    """No BOS anywhere; turns end with the end token and a line break."""
    return _made(["<|im_start|>", "<|im_end|>"], None, CHATML, eos="<|im_end|>", pad="<|im_end|>")


def bare():
    """BOS before a text, and a chat template without any special token."""
    return _made(["<s>", "</s>"], "<s> $A", BARE_CHAT, bos="<s>", eos="</s>", pad="</s>")


def bert():
    """A text between two special tokens, as encoders take it; the latter is the end token, too."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    return _made(special, "[CLS] $A [SEP]", None, cls="[CLS]", sep="[SEP]", eos="[SEP]", pad="[PAD]")


KINDS = {"gemma": gemma, "chatml": chatml, "bare": bare, "bert": bert}
