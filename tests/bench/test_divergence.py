"""Perplexity and KL divergence against the formulas in float64 on whole distributions, whatever the chunks and however often a run was interrupted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T

from server.bench import divergence
from server.bench.divergence import score
from server.bench.reference import REST, Floats, ReferenceReader, ReferenceWriter, Said
from server.bench.windows import Window, chat_windows, digest, text_windows
from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile
from server.engine.loader import load_model
from server.engine.protocol import Step
from server.errors import ConfigError
from server.text.template import ChatTemplate
from server.text.tokenizer import ByteTokenizer
from tests.engine.tiny_models import write_tiny

SETTING = {"text": "abc", "vocab": 300}


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl(p: Floats, q: Floats) -> Floats:
    """From log-probabilities [m, vocab]."""
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def bound(p: Floats, q: Floats) -> float:
    """How far a kept distribution may be off: the rest taken as one loses at most REST * KL(rest || rest) and that is no more than twice the largest
    ratio; float32 rounds ln p by 2^-24 of it, which moves sum p (ln p - ln q) by at most that times the largest ratio."""
    ratio = float(np.abs(p - q).max())
    return REST * 2 * ratio + 2.0**-24 * float(np.abs(p).max()) * ratio + 1e-12


# --- What is kept of a distribution ------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 7, 300, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 12.0])
def test_kl_from_what_is_kept_is_that_of_whole_distributions(vocab: int, spread: float) -> None:
    rng = np.random.default_rng(vocab)
    logits = (spread * rng.standard_normal((9, vocab))).astype(np.float32).astype(np.float64)
    p, q = log_softmax(logits), log_softmax(logits + 0.3 * rng.standard_normal(logits.shape))
    said = Said.of(p, np.zeros(9, np.int64))
    assert np.abs(said.kl(q) - kl(p, q)).max() <= bound(p, q)
    assert np.abs(said.kl(p)).max() <= 1e-12
    assert (said.rest <= REST).all()
    if vocab == 5000 and spread == 12:
        assert said.counts.max() < 1000


def test_parts_and_joining_are_inverse() -> None:
    rng = np.random.default_rng(0)
    p = log_softmax(6 * rng.standard_normal((10, 400)))
    whole = Said.of(p, np.arange(10))
    parts = [whole.part(0, 3), whole.part(3, 4), whole.part(4, 10)]
    for mine, theirs in zip(Said.joined(parts).arrays(), whole.arrays(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(parts[1].kl(p[3:4] + 0.0), whole.kl(p)[3:4])


def test_the_rest_counts_as_one() -> None:
    """With a rest of one entry, or of entries that keep their proportions, taking it as one is exact."""
    for rest in ([1e-10], [2e-10, 1e-10]):
        p = np.log([[1 - sum(rest), *rest]])
        q = np.log([[0.4, *(0.6 * value / sum(rest) for value in rest)]])
        said = Said.of(p, np.zeros(1, np.int64))
        assert said.counts.tolist() == [1]
        np.testing.assert_allclose(said.kl(q) - kl(p[:, :1], q[:, :1]), sum(rest) * math.log(sum(rest) / 0.6), rtol=1e-5)


def test_mass_that_the_other_model_lacks_stays_finite() -> None:
    p, q = log_softmax(np.array([[0.0, -22.0, -23.0]])), log_softmax(np.array([[0.0, -800.0, -900.0]]))
    found = float(Said.of(p, np.zeros(1, np.int64)).kl(q)[0])
    assert 0 < found < math.inf


# --- The reference's file ----------------------------------------------------


def said(seed: int, rows: int = 5) -> Said:
    return Said.of(log_softmax(5 * np.random.default_rng(seed).standard_normal((rows, 300))), np.arange(rows))


def written(path: Path, windows: list[Said], done: int = 0) -> bytes:
    with closing(ReferenceWriter(path, SETTING, done)) as writer:
        for window in windows:
            writer.append(window)
    return path.read_bytes()


def test_windows_are_there_again(tmp_path: Path) -> None:
    windows = [said(n, rows) for n, rows in enumerate((5, 1, 7))]
    written(tmp_path / "ref", windows)
    with closing(ReferenceReader(tmp_path / "ref")) as reader:
        assert reader.setting == SETTING
        for mine, theirs in zip(reader, windows, strict=True):
            for a, b in zip(mine.arrays(), theirs.arrays(), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_reference_goes_on_behind_the_windows_that_are_done(kept: int, tmp_path: Path) -> None:
    windows = [said(n) for n in range(4)]
    whole = written(tmp_path / "whole", windows)
    written(tmp_path / "ref", windows[:3])
    with (tmp_path / "ref").open("ab") as file:
        file.write(b"half a window")
    assert written(tmp_path / "ref", windows[kept:], kept) == whole


def test_references_that_cannot_be_used(tmp_path: Path) -> None:
    ref = tmp_path / "ref"
    whole = written(ref, [said(0), said(1)])
    with pytest.raises(ConfigError, match="is the reference of another run"):
        ReferenceWriter(ref, {**SETTING, "vocab": 3}, 0)
    with pytest.raises(ConfigError, match="has 2 windows, but 3 are done already"):
        ReferenceWriter(ref, SETTING, 3)
    ref.write_bytes(whole[:-5])
    with closing(ReferenceReader(ref)) as reader, pytest.raises(ConfigError, match="is cut short or damaged"):
        list(reader)
    ref.write_bytes(b"GGUF\x00\xff nothing\n")
    with pytest.raises(ConfigError, match="is no reference"):
        ReferenceReader(ref)
    with pytest.raises(ConfigError, match="No such file"):
        ReferenceReader(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="Cannot write --save_reference"):
        ReferenceWriter(tmp_path / "nowhere" / "ref", SETTING, 0)


# --- Windows -----------------------------------------------------------------

BYTES = ByteTokenizer(vocab_size=300, bos_id=257, eos_id=258, stop_ids=[258])


def test_a_text_is_cut_without_overlap_and_its_second_halves_are_scored() -> None:
    windows = text_windows("abcdefghijklmnopqrs", BYTES, 8)
    assert [bytes(window.ids) for window in windows] == [b"abcdefgh", b"ijklmnop"]
    assert [window.first for window in windows] == [5, 5]  # llama.cpp: the logits of token size / 2 are the first that count
    with pytest.raises(ConfigError, match="has 3 tokens, less than one window of 8"):
        text_windows("abc", BYTES, 8)
    assert bytes(text_windows("<300>abcd", ByteTokenizer(vocab_size=400), 4)[0].ids) == b"<300"  # control tokens are plain text


def test_bos_takes_the_first_place_of_each_window() -> None:
    tokenizer = ByteTokenizer(vocab_size=300, bos_id=257, add_bos=True)
    assert [window.ids for window in text_windows("abcdefghi", tokenizer, 4)] == [(257, *b"abc"), (257, *b"efg")]


@pytest.mark.parametrize("opens", [True, False])
def test_a_chat_is_in_the_models_own_template_and_its_reply_is_scored(opens: bool) -> None:
    template = ChatTemplate("U:{{ messages[0].content }}\nA:" + ("<think>\n" if opens else ""))
    for window in chat_windows(BYTES, template, 4):
        assert bytes(window.ids[: window.first]).endswith(b"\nA:<think>" if opens else b"\nA:")
        text = bytes(window.ids[:-1]).decode()
        assert text.count("<think>") == text.count("<think>\n") == 1
        assert window.ids[-1] == 258
    assert len(chat_windows(BYTES, template)) == 320


@pytest.mark.parametrize("limit", [1, 4])
def test_a_whole_chat_is_scored_from_where_chats_differ(limit: int) -> None:
    """What follows "U:" and nothing else is guessed alike in every chat."""
    replies, chats = (chat_windows(BYTES, ChatTemplate("U:{{ messages[0].content }}\nA:"), limit, whole=whole) for whole in (False, True))
    assert [window.ids for window in chats] == [window.ids for window in replies]
    assert [window.first for window in chats] == [3] * limit


def test_a_digest_is_of_tokens_and_places() -> None:
    assert digest([Window((1, 2, 3), 1)]) == digest([Window((1, 2, 3), 1)])
    assert len({digest(w) for w in ([Window((1, 2, 3), 1)], [Window((1, 2, 3), 2)], [Window((1, 2), 1), Window((3,), 1)], [Window((1, 2, 4), 1)])}) == 4


# --- Scoring -----------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, and the same one rounded."""
    directory = tmp_path_factory.mktemp("models")
    for name, kind in (("whole", T.F32), ("rounded", T.Q4_0)):
        write_tiny(
            directory / f"{name}.gguf", "qwen3moe", vocab=300, moe_intermediate_size=64, quant=lambda tensor, kind=kind: kind if "ffn" in tensor else T.F32
        )
    return {name: directory / f"{name}.gguf" for name in ("whole", "rounded")}


@contextmanager
def engine(path: Path, prefill_chunk: int = 512) -> Iterator[LocalEngine]:
    loaded = load_model(GGUFFile.open(path), EngineConfig(cpu_infer=1, cache_lens=256, cache_type="f32", prefill_chunk=prefill_chunk))
    yield loaded.engine
    loaded.engine.close()


def window(n: int, first: int, seed: int = 0) -> Window:
    return Window(tuple(np.random.default_rng(seed).integers(0, 300, n).tolist()), first)


def direct(path: Path, window: Window) -> Floats:
    """Log-probabilities before each scored token, from one step over all of the window."""
    with engine(path) as whole:
        return log_softmax(whole.logits(Step(window.ids, 0, (0, 1, 2, 3), None)).numpy().astype(np.float64))[window.first - 1 : -1]


@pytest.mark.parametrize(("n", "first"), [(200, 101), (200, 1), (2, 1), (65, 64), (130, 66)])
@pytest.mark.parametrize("prefill_chunk", [7, 64, 512])
def test_the_nll_of_scored_tokens_whatever_the_chunks(models: dict[str, Path], n: int, first: int, prefill_chunk: int) -> None:
    tokens = window(n, first)
    expected = -direct(models["whole"], tokens)[np.arange(n - first), list(tokens.ids[first:])]
    with engine(models["whole"], prefill_chunk) as chunked:
        found = score(chunked, tokens)
    np.testing.assert_allclose(found["nll"], expected, atol=1e-4)
    assert set(found) == {"nll"}


def test_a_model_beside_itself_and_beside_its_rounded_twin(models: dict[str, Path]) -> None:
    tokens, kept = window(200, 101), []
    with engine(models["whole"]) as whole:
        plain = score(whole, tokens, keep=kept.append)
        itself = score(whole, tokens, kept[0])
    assert itself["nll"] == itself["reference_nll"] == plain["nll"]
    assert max(map(abs, itself["kl"])) < 1e-12
    assert set(itself["same_top"]) == {1}
    with engine(models["rounded"]) as rounded:
        twin = score(rounded, tokens, kept[0])
    p, q = direct(models["whole"], tokens), direct(models["rounded"], tokens)
    assert np.mean(twin["kl"]) > 1e-4
    np.testing.assert_allclose(twin["kl"], kl(p, q), rtol=10.0**-6, atol=bound(p, q))
    assert twin["same_top"] == (p.argmax(1) == q.argmax(1)).astype(int).tolist()
    assert twin["reference_nll"] == plain["nll"]


def test_a_reference_of_other_windows_is_refused(models: dict[str, Path]) -> None:
    with engine(models["whole"]) as whole, pytest.raises(ConfigError, match="another number of tokens"):
        score(whole, window(20, 10), said(0, 5))


# --- Results -----------------------------------------------------------------


def test_a_summary_is_means_over_tokens_and_quantiles() -> None:
    records = [
        {"nll": [1.0, 2.0], "reference_nll": [1.0, 1.0], "kl": [0.1, 0.3], "same_top": [1, 0]},
        {"nll": [3.0], "reference_nll": [3.0], "kl": [0.2], "same_top": [1]},
    ]
    result = divergence.summary(records)
    assert (result["windows"], result["tokens"]) == (2, 3)
    assert result["perplexity"].value == pytest.approx(math.exp(2))
    assert result["perplexity"].error == pytest.approx(math.exp(2) * math.sqrt(2 * (1 + 1)) / 3)  # sums 3 and 3 of sizes 2 and 1 around a mean of 2
    assert result["reference_perplexity"].value == pytest.approx(math.exp(5 / 3))
    assert result["perplexity_ratio"].value == pytest.approx(math.exp(1 / 3))
    assert {name: found.value for name, found in result["kl"].items()} == pytest.approx(
        {"mean": 0.2, "median": 0.2, "p90": 0.28, "p99": 0.298, "p99_9": 0.2998, "max": 0.3}
    )
    assert result["kl"]["max"].error is None
    assert result["same_top"].value == pytest.approx(2 / 3)
    assert set(divergence.summary([{"nll": [1.0]}])) == {"windows", "tokens", "perplexity"}


def test_a_difference_is_token_by_token() -> None:
    a = [{"nll": [1.0, 2.0], "kl": [0.1, 0.1], "same_top": [1, 0]}, {"nll": [5.0], "kl": [0.1], "same_top": [1]}]
    b = [{"nll": [1.5, 2.5], "kl": [0.2, 0.2], "same_top": [1, 1]}, {"nll": [5.5], "kl": [0.2], "same_top": [1]}]
    changed = divergence.difference(a, b)
    assert (changed["perplexity_ratio"].value, changed["perplexity_ratio"].error) == pytest.approx((math.exp(0.5), 0))  # the same everywhere
    assert (changed["kl_mean"].value, changed["same_top"].value) == pytest.approx((0.1, 1 / 3))
    assert set(divergence.difference([{"nll": [1.0]}], b[1:])) == {"perplexity_ratio"}
    with pytest.raises(ConfigError, match="not over the same windows"):
        divergence.difference(a, b[:1])
