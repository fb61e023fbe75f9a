"""T5's tokenizer against transformers and against ids recorded from SentencePiece.

`t5/spiece.model` is a SentencePiece 0.2.3 unigram model of 200 pieces, trained on captions of the
scene world with T5's special pieces and a small table of characters; `sentencepiece.json` holds
that library's ids of some texts, and `tokenizer.json` is what transformers makes of the model.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import T5Tokenizer as Reference

from data_pipelines.tokenizers import encode
from data_pipelines.tokenizers_t5 import T5Tokenizer

FOLDER = Path(__file__).parent / "t5"
RECORDED = json.loads((FOLDER / "sentencepiece.json").read_text("utf-8"))
# Special pieces are recognised in a text by transformers, not by SentencePiece.
SPECIAL = ["</s> a <pad>b<unk>", "<extra_id_0> a <extra_id_99>", "a▁b ▁ c"]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=["tokenizer.json", "spiece.model"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> T5Tokenizer:
    folder = tmp_path_factory.mktemp("t5")
    shutil.copy(FOLDER / request.param, folder)
    return T5Tokenizer.from_folder(folder)


@pytest.mark.parametrize("text", [*RECORDED, *SPECIAL])
def test_equals_transformers(ours: T5Tokenizer, reference: Reference, text: str) -> None:
    assert [*ours.tokens(text), ours.eos_id] == reference(text)["input_ids"]


@pytest.mark.parametrize("text", RECORDED)
def test_equals_sentencepiece(ours: T5Tokenizer, text: str) -> None:
    assert list(ours.tokens(text)) == RECORDED[text]


@pytest.mark.parametrize("length", [4, 12, 77])
def test_padding_and_truncation(ours: T5Tokenizer, reference: Reference, length: int) -> None:
    texts = list(RECORDED)
    expected = reference(texts, padding="max_length", truncation=True, max_length=length)
    found = ours.encode_batch(texts, length)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected["input_ids"])


def test_an_empty_text_is_its_end(ours: T5Tokenizer) -> None:
    assert ours.encode_batch([""], 4).tolist() == [[1, 0, 0, 0]]


def test_cut_tokens_are_counted(ours: T5Tokenizer) -> None:
    text = "a red kettle on a stove"
    whole = len(ours.tokens(text))
    ids, cut = encode(ours, text, 4)
    assert cut == whole - 3
    assert ids.tolist() == [*ours.tokens(text)[:3], ours.eos_id]
    assert encode(ours, text, whole + 1)[1] == 0


def test_special_ids_and_size(ours: T5Tokenizer, reference: Reference) -> None:
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 1, 0)
    assert ours.vocab_size == len(reference) == 300


def test_survives_pickling(ours: T5Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(ours))
    assert [again.tokens(t) for t in RECORDED] == [ours.tokens(t) for t in RECORDED]


def test_written_folder_is_a_hugging_face_folder(ours: T5Tokenizer, tmp_path: Path) -> None:
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = Reference.from_pretrained(tmp_path)
    for text in RECORDED:
        assert theirs(text)["input_ids"] == [*ours.tokens(text), ours.eos_id]


def test_number_of_sentinels_is_the_folders(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 7}')
    assert T5Tokenizer.from_folder(tmp_path).vocab_size == 207


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or spiece\.model"):
        T5Tokenizer.from_folder(tmp_path)
    whole = (FOLDER / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"spiece\.model: expected a SentencePiece model, found"):
        T5Tokenizer.from_folder(tmp_path)
    (tmp_path / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"spiece\.model: expected a SentencePiece"):
        T5Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="expected a Unigram model, found 'BPE'"):
        T5Tokenizer.from_folder(tmp_path)


def test_vocabulary_without_an_end() -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0), ("<pad>", 0.0)], 0))
    with pytest.raises(ValueError, match="of 2 tokens: expected </s> and <pad>, </s> missing"):
        T5Tokenizer(backend)


def test_library_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        T5Tokenizer.from_folder(FOLDER)
