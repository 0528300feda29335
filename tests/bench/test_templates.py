"""Prompts of several turns, under every template, to the letter and to the token."""

import pytest

from kangaroo.bench.templates import CHECKPOINT, TEMPLATES, choose_template, encode_prompt, stop_ids
from kangaroo.errors import PromptError
from kangaroo.model.tokenizer import Tokenizer
from tests.tiny import BOS, tiny_tokenizer

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. ")  # fmt: skip
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n")  # fmt: skip
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
PROMPTS = {
    "vicuna": VICUNA + "USER: q1 ASSISTANT: {a}</s>USER: q2 ASSISTANT:",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
    "<|im_start|>assistant\n{a}<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    "llama3": f"{HEAD.format('user')}q1<|eot_id|>{HEAD.format('assistant')}{{a}}<|eot_id|>"
    f"{HEAD.format('user')}q2<|eot_id|>{HEAD.format('assistant')}",
    "alpaca": ALPACA + "### Instruction:\nq1\n\n### Response:\n{a}\n\n### Instruction:\nq2\n\n### Response:\n",
    "none": "q1\n\n{a}\n\nq2",
}
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip


def make_tokenizer(*special: str, chat_template: str | None = None) -> Tokenizer:
    backend = tiny_tokenizer()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, settings={}, chat_template=chat_template)


def test_every_template_is_tested() -> None:
    assert set(PROMPTS) == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_second_prompt_holds_the_first_answer(name: str) -> None:
    # A text may hold what formatting or a template would take for its own.
    assert TEMPLATES[name].render(["q1", "q2"], ["{a} {}"]) == PROMPTS[name].replace("{a}", "{a} {}")


def test_a_prompt_of_one_turn_without_a_template_is_the_text_itself() -> None:
    tokenizer = make_tokenizer()
    assert encode_prompt(tokenizer, "none", turns=["def f():\n"], answers=[]) == tokenizer.encode("def f():\n")


@pytest.mark.parametrize(
    ("name", "special"), [("vicuna", ["</s>"]), ("chatml", ["<|im_start|>", "<|im_end|>"]),
                          ("llama3", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])]
)  # fmt: skip
def test_special_tokens_are_one_token_where_the_vocabulary_has_them(name: str, special: list[str]) -> None:
    tokenizer, without = make_tokenizer(*special), make_tokenizer()
    ids = encode_prompt(tokenizer, name, turns=["q1", "q2"], answers=["a"])
    text, vocab = PROMPTS[name].replace("{a}", "a"), tokenizer.vocab()
    assert {token: ids.count(vocab[token]) for token in special} == {token: text.count(token) for token in special}
    # The BOS is the checkpoint's, and there is one.
    assert (ids[0], ids.count(vocab[BOS])) == (vocab[BOS], 1)
    assert stop_ids(tokenizer, name) == (vocab[special[1 if name == "chatml" else 0]],)
    # A vocabulary without them spells them out.
    assert encode_prompt(without, name, turns=["q1", "q2"], answers=["a"]) == without.encode(text)
    assert len(without.encode(text)) == 1 + len(text)
    assert stop_ids(without, name) == ()


def test_the_template_of_a_checkpoint_is_told_who_said_what() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    ids = encode_prompt(tokenizer, CHECKPOINT, turns=["q1", "q2"], answers=["a"])
    assert tokenizer.decode(ids) == "<user>q1<assistant>a<user>q2<assistant>"
    assert tokenizer.decode(encode_prompt(tokenizer, CHECKPOINT, turns=["q"], answers=[])) == "<user>q<assistant>"
    assert stop_ids(tokenizer, CHECKPOINT) == ()


def test_the_template_of_a_checkpoint_is_the_default_where_there_is_one() -> None:
    chat, base = make_tokenizer(chat_template=CHAT), make_tokenizer()
    assert [choose_template(chat, None), choose_template(base, None)] == [CHECKPOINT, "none"]
    assert [choose_template(chat, CHECKPOINT), choose_template(chat, "vicuna")] == [CHECKPOINT, "vicuna"]
    with pytest.raises(PromptError, match="has no chat template; give template vicuna, "):
        choose_template(base, CHECKPOINT)
