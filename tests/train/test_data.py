"""Reading data: what becomes a document, which tokens are learned, and how batches are drawn."""

import json

import numpy as np
import pytest
import torch

from kangaroo.errors import DataError
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.train.data import MAX_SOURCE_FILE, Corpus, Dataset, chat_documents, plain_document, read_corpus
from tests.tiny import tiny_tokenizer

MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


def learned(document, tokenizer):
    """The text of every run of tokens with loss."""
    runs = np.split(document.tokens, np.flatnonzero(np.diff(document.mask.astype(int))) + 1)
    starts = np.cumsum([0] + [len(run) for run in runs[:-1]])
    return [tokenizer.decode(run.tolist()) for run, start in zip(runs, starts, strict=True) if document.mask[start]]


def read(tokenizer, *paths, eos_id=257):
    return read_corpus(paths, tokenizer, eos_id=eos_id)


def test_a_text_file_is_one_document_between_bos_and_eos(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("hop\nhop")
    (document,) = read(tokenizer, tmp_path / "a.txt").documents
    assert document.tokens[0] == 256
    assert document.tokens[-1] == 257
    assert tokenizer.decode(document.tokens.tolist()) == "hop\nhop"
    assert document.mask.tolist() == [False] + [True] * 8


def test_a_model_without_eos_gets_none(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("hop")
    (document,) = read(tokenizer, tmp_path / "a.txt", eos_id=None).documents
    assert len(document.tokens) == 4


def test_every_jsonl_line_is_a_document(tokenizer, tmp_path):
    lines = [json.dumps({"text": "one\u2028line"}), "", json.dumps({"messages": MESSAGES[:2]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    first, second = read(tokenizer, tmp_path / "a.jsonl").documents
    assert tokenizer.decode(first.tokens.tolist()) == "one\u2028line"
    assert learned(second, tokenizer) == ["hello\n"]


def test_only_assistant_turns_are_learned(tokenizer):
    (document,) = chat_documents(MESSAGES, tokenizer)
    assert tokenizer.decode(document.tokens.tolist()) == "<user>hi\n<assistant>hello\n<user>bye\n<assistant>see you\n"
    assert learned(document, tokenizer) == ["hello\n", "see you\n"]


def test_a_template_that_rewrites_earlier_turns_gives_one_document_per_turn():
    template = ("{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}(thinks){% endif %}"
                "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=template)
    documents = chat_documents(MESSAGES, tokenizer)
    assert [learned(document, tokenizer) for document in documents] == [["(thinks)hello\n"], ["(thinks)see you\n"]]


def test_a_conversation_without_an_assistant_teaches_nothing(tokenizer):
    assert chat_documents(MESSAGES[:1], tokenizer) == []


def test_a_folder_is_read_sorted_without_hidden_files_large_sources_or_binary_files(tokenizer, tmp_path):
    for name, text in {"b.py": "b", "sub/c.md": "c", "a.txt": "a", ".hidden.py": "h", ".git/x.py": "g",
                       "notes.pdf": "p", "empty.py": " \n"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "large.py").write_text("x" * (MAX_SOURCE_FILE + 1))
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    corpus = read(tokenizer, tmp_path)
    assert [tokenizer.decode(document.tokens.tolist()) for document in corpus.documents] == ["a", "b", "c"]
    assert corpus.num_skipped == 2
    assert corpus.skipped_note() == "skipped 1 file over 1 MiB and 1 file not in UTF-8"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
def test_a_large_text_in_a_folder_is_read_in_full(name, tokenizer, tmp_path):
    text = "hop over\n" * (MAX_SOURCE_FILE // 8)
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    corpus = read(tokenizer, tmp_path)
    (document,) = corpus.documents
    assert len(document.tokens) == len(text) + 2
    assert corpus.skipped_note() == ""


def test_progress_can_be_followed_file_by_file(tokenizer, tmp_path):
    for name in ("b.txt", "a.py"):
        (tmp_path / name).write_text("hop")
    passed = []

    def track(files):
        for file in files:
            passed.append(file)
            yield file

    read_corpus([tmp_path, tmp_path / "b.txt"], tokenizer, track=track)
    assert passed == [(tmp_path / "a.py", True), (tmp_path / "b.txt", True), (tmp_path / "b.txt", False)]


def test_a_large_source_file_given_by_name_is_read(tokenizer, tmp_path):
    (tmp_path / "a.py").write_text("x" * (MAX_SOURCE_FILE + 1))
    assert len(read(tokenizer, tmp_path / "a.py").documents) == 1


def test_skipped_files_are_counted_where_nothing_is_left(tokenizer, tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x" * (MAX_SOURCE_FILE + 1))
    with pytest.raises(DataError, match=r"holds no text to learn from \(skipped 2 files over 1 MiB\); give \.txt"):
        read(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"text": ', "no JSON"), ("[1]", 'give an object with a string "text"'), ('{"text": 3}', 'a string "text"'),
     ('{"messages": [{"role": "user"}]}', '"messages"'), ('{"messages": "hi"}', '"messages"')],
)  # fmt: skip
def test_a_malformed_line_is_named_by_its_number(line, reason, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{reason}") as caught:
        read(tokenizer, tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_messages_without_a_chat_template_name_the_line(tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(DataError, match="line 1: this checkpoint has no chat template"):
        read(tokenizer, tmp_path / "a.jsonl")


def test_unsupported_missing_and_empty_data_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    (tmp_path / "folder").mkdir()
    for name, reason in {"a.pdf": r"unsupported data file .*a\.pdf; give \.txt", "none.txt": "no such data file",
                         "empty.txt": "holds no text to learn from", "folder": "holds no text to learn from",
                         "latin.txt": r"is not UTF-8 text \(byte 2\)"}.items():  # fmt: skip
        with pytest.raises(DataError, match=reason):
            read(tokenizer, tmp_path / name)


def test_too_little_text_for_two_windows_is_refused(tokenizer):
    with pytest.raises(DataError, match="the data holds 4 tokens, 3 of them to learn: too few for two windows of 16"):
        Dataset(Corpus((plain_document("hop", tokenizer, eos_id=None),)), sequence_length=16)


def test_one_long_document_is_split_at_its_end(tokenizer):
    document = plain_document("0123456789" * 40, tokenizer, eos_id=257)
    data = Dataset(Corpus((document,)), sequence_length=16)
    tokens, _ = data.held_out.at(np.array([0]))
    assert len(data.train) == 23
    assert len(data.held_out) == 1
    assert tokens[0].tolist() == document.tokens[-20:-3].tolist()


def test_held_out_documents_are_whole_and_the_same_wherever_they_stand(tokenizer):
    documents = tuple(plain_document(f"document {i}", tokenizer, eos_id=257) for i in range(400))
    first, second = (Dataset(Corpus(order), sequence_length=16) for order in (documents, documents[::-1]))
    assert first.num_tokens == sum(len(document.tokens) for document in documents)
    assert first.held_out.num_tokens == second.held_out.num_tokens
    assert 0.02 < first.held_out.num_tokens / first.num_tokens < 0.1


def test_batches_depend_on_seed_and_step_alone_and_cover_every_window_once_per_epoch(dataset):
    size = len(dataset.train)
    windows = torch.cat([dataset.batch(1, seed=3, step=step)[0] for step in range(size)])
    assert torch.equal(windows, dataset.batch(size, seed=3, step=0)[0])
    everything, _ = dataset.train.at(np.arange(size))
    assert sorted(windows.tolist()) == sorted(everything.tolist())
    assert not torch.equal(windows, dataset.batch(size, seed=3, step=1)[0])
    assert not torch.equal(windows, dataset.batch(size, seed=4, step=0)[0])


def test_the_mask_of_a_batch_belongs_to_the_predicted_tokens(tokenizer):
    documents = tuple(plain_document("hop " * 10, tokenizer, eos_id=257) for _ in range(20))
    data = Dataset(Corpus(documents), sequence_length=8)
    tokens, mask = data.batch(20, seed=0, step=0)
    assert torch.equal(mask, tokens[:, 1:] != 256)


def test_windows_without_a_token_to_learn_are_left_out(tokenizer):
    questions = [f"{i} " + "x" * 200 for i in range(200)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in questions]
    data = Dataset(Corpus(tuple(chat_documents(chat, tokenizer)[0] for chat in chats)), sequence_length=8)
    assert 0 < len(data.train) < 400
    _, mask = data.train.at(np.arange(len(data.train)))
    assert mask.any(dim=1).all()
