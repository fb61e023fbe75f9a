"""CLIP BPE against transformers on the same folder, and the training of small vocabularies."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest
from transformers import CLIPTokenizer

from data_pipelines.bpe_training import main, train_clip_bpe
from data_pipelines.image_text import load_tokenizer
from data_pipelines.scenes import HELD_OUT, Scenes
from data_pipelines.tokenizers import ClipTokenizer, clean, encode, split_pieces
from tests.data.conftest import TEXTS

TRICKY = [
    "",
    "  Two   spaces\tand CAPS \n",
    "don't Don'T I'LL we've they'RE!!",
    "<|endoftext|> a <|startoftext|>b",
    "a <|ENDOFTEXT|> b <|end",
    "naïve café e\u0301 ﬁ",
    "ΟΔΟΣ Σ σας",
    "İstanbul ı ẞß ŉ",
    "中文 字，标点。 한국어",
    "１２ ½ ² Ⅷ ٣٤५ 1234",
    "\u200b\u3000x\u00a0\u2003y\ufeff",
    "a\x1cb\x85c\x00\x7f",
    "😀😀x👍🏽",
    "!'s ''re ...'d",
]


@pytest.fixture(scope="module")
def pair(tokenizer_folder):
    return (
        ClipTokenizer.from_folder(tokenizer_folder),
        CLIPTokenizer.from_pretrained(tokenizer_folder),
    )


@pytest.mark.parametrize("text", TRICKY + list(TEXTS))
def test_equals_transformers(pair, text):
    ours, theirs = pair
    expected = theirs(text)["input_ids"]
    assert [ours.bos_id, *ours.tokens(text), ours.eos_id] == expected


def test_equals_transformers_on_random_unicode(pair):
    ours, theirs = pair
    blocks = [(1, 0x250), (0x300, 0x320), (0x370, 0x400), (0x2000, 0x2070), (0x4E00, 0x4E40)]
    pool = [chr(c) for a, b in blocks for c in range(a, b)]
    rng = random.Random(0)
    texts = ["".join(rng.choices(pool, k=rng.randint(0, 20))) for _ in range(500)]
    different = [t for t in texts if list(ours.tokens(t)) != theirs(t)["input_ids"][1:-1]]
    assert different == []


@pytest.mark.parametrize("length", [5, 12, 77])
def test_padding_and_truncation_equal_transformers(pair, length):
    ours, theirs = pair
    texts = [*TEXTS, "", "a " * 100]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    assert np.array_equal(ours.encode_batch(texts, length), np.array(expected))


def test_cut_tokens_are_counted(pair):
    ours, _ = pair
    ids, cut = encode(ours, "1 2 3 4 5", 5)
    assert cut == 2
    assert ids[0] == ours.bos_id
    assert ids[-1] == ours.eos_id
    assert encode(ours, "1 2 3", 5)[1] == 0


def test_tokenizer_json_gives_the_same(pair, tmp_path):
    ours, theirs = pair
    (tmp_path / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str(), "utf-8")
    again = ClipTokenizer.from_folder(tmp_path)
    assert [again.tokens(t) for t in TRICKY] == [ours.tokens(t) for t in TRICKY]


def test_written_folder_is_a_hugging_face_folder(pair, tmp_path):
    ours, _ = pair
    ours.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id == ours.pad_id == ours.eos_id
    again = ClipTokenizer.from_folder(tmp_path)
    assert again.files() == ours.files()


def test_survives_pickling(pair):
    ours, _ = pair
    again = pickle.loads(pickle.dumps(ours))
    assert again.tokens(TEXTS[0]) == ours.tokens(TEXTS[0])


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected vocab\.json and merges\.txt"):
        ClipTokenizer.from_folder(tmp_path)


def test_folder_of_another_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"<\|startoftext\|>.*missing"):
        ClipTokenizer.from_folder(tmp_path)


def test_trained_vocabulary_layout():
    tokenizer = train_clip_bpe(TEXTS * 2, 560)
    assert tokenizer.vocab_size == 560
    assert (tokenizer.bos_id, tokenizer.eos_id) == (558, 559)
    vocab = json.loads(tokenizer.files()["vocab.json"])
    assert sorted(vocab.values()) == list(range(560))


def test_training_stops_when_nothing_repeats_and_learns_whole_words():
    tokenizer = train_clip_bpe(["red kettle", "red kettle"], 5000)
    assert tokenizer.vocab_size < 5000
    assert len(tokenizer.tokens("red kettle")) == 2


def test_training_does_not_depend_on_order():
    assert train_clip_bpe(TEXTS, 540).files() == train_clip_bpe(TEXTS[::-1], 540).files()


def test_two_merges_may_give_one_token():
    texts = ["abc"] * 9 + ["ab"] * 8 + ["xbc"] * 20 + ["bcq", "abq"] * 5
    tokenizer = train_clip_bpe(texts, 5000)
    vocab = json.loads(tokenizer.files()["vocab.json"])
    assert sorted(vocab.values()) == list(range(len(vocab)))


def test_counts_are_repetitions():
    assert train_clip_bpe({TEXTS[0]: 3, TEXTS[1]: 1}, 540).files() == (
        train_clip_bpe([*[TEXTS[0]] * 3, TEXTS[1]], 540).files()
    )


def test_tokenizer_of_the_scene_world():
    """The committed one: fits the captions of held-out scenes, no English word is taken apart."""
    tokenizer = load_tokenizer("scene")
    assert tokenizer.vocab_size == 1024
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1022, 1023)
    scenes = Scenes(start=HELD_OUT, count=40, image_size=16, short_captions=2)
    for i in range(len(scenes)):
        record = scenes[i]
        phrases = [p for r in record.regions for p in (r.phrase, r.long_phrase, *r.negatives) if p]
        for text in (*record.short_captions, record.long_caption, *phrases):
            assert len(tokenizer.tokens(text)) == len(split_pieces(clean(text))), text


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="at least 515"):
        train_clip_bpe(TEXTS, 514)


def test_training_command(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 2), "utf-8")
    out = tmp_path / "folder"
    main(["--texts", str(tmp_path / "texts.txt"), "--vocab-size", "530", "--out", str(out)])
    assert "530 tokens in" in capsys.readouterr().out
    assert ClipTokenizer.from_folder(out).vocab_size == 530
