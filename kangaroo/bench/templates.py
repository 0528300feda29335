"""Conversation templates: how the turns of a question and the answers so far become one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from kangaroo.errors import PromptError
from kangaroo.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """The texts around what is said, as a family of checkpoints was trained on them.

    system stands first; turn and answer hold {} where a turn's and an earlier answer's text goes. None of them holds a
    BOS, which the checkpoint's own rule adds. stop: the token that ends an answer, where the vocabulary has it.
    """

    turn: str
    answer: str
    system: str = ""
    stop: str | None = None

    def render(self, turns: Sequence[str], answers: Sequence[str]) -> str:
        """The prompt that asks for the answer to the last of the turns; answers are those to the turns before."""
        former = zip(turns[:-1], answers, strict=True)
        told = "".join(self.turn.format(turn) + self.answer.format(answer) for turn, answer in former)
        return self.system + told + self.turn.format(turns[-1])


TEMPLATES = {
    "vicuna": Template(
        turn="USER: {} ASSISTANT:",
        answer=" {}</s>",
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. ",
        stop="</s>",
    ),
    "chatml": Template(
        turn="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}<|im_end|>\n",
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        stop="<|im_end|>",
    ),
    "llama3": Template(
        turn="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{}<|eot_id|>",
        stop="<|eot_id|>",
    ),
    "alpaca": Template(
        turn="### Instruction:\n{}\n\n### Response:\n",
        answer="{}\n\n",
        system="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n",
    ),
    "none": Template(turn="{}", answer="\n\n{}\n\n"),
}
# The checkpoint's own chat template.
CHECKPOINT = "checkpoint"


def choose_template(tokenizer: Tokenizer, name: str | None) -> str:
    """The template of this name; None takes the checkpoint's own where it has one, else "none".

    Raises PromptError for "checkpoint" where the checkpoint has none.
    """
    if name is None:
        return CHECKPOINT if tokenizer.has_chat_template else "none"
    if name == CHECKPOINT and not tokenizer.has_chat_template:
        raise PromptError(f"this checkpoint has no chat template; give template {', '.join(TEMPLATES)}")
    return name


def encode_prompt(tokenizer: Tokenizer, template: str, *, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Token ids of the prompt that asks for the answer to the last of the turns, under the template of this name.

    The special tokens of a template are special tokens wherever the vocabulary has them, else plain text.
    Raises PromptError for text that cannot be encoded, and where the checkpoint's template refuses it.
    """
    if template != CHECKPOINT:
        return tokenizer.encode(TEMPLATES[template].render(turns, answers))
    messages = []
    for turn, answer in zip(turns, [*answers, ""], strict=True):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return tokenizer.encode_chat(messages[:-1])


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The token that ends an answer under a template, beside the checkpoint's EOS, if the vocabulary has it."""
    stop = TEMPLATES[template].stop if template in TEMPLATES else None
    token = None if stop is None else tokenizer.vocab().get(stop)
    return () if token is None else (token,)
