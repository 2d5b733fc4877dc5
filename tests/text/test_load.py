"""Where tokenizer and template come from, and what a person reads when they cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from server.errors import GGUFError, ModelError, ModelNotFound, UnsupportedModel
from server.text.load import from_directory, load_template, load_tokenizer
from server.text.vocabulary import from_metadata
from tests.text.conftest import STRINGS, Trained


@pytest.fixture
def directory(trained: Trained, tmp_path: Path) -> Path:
    """A Hugging Face directory of the trained tokenizer."""
    trained.original.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 80]}')
    return tmp_path


def test_an_unknown_pre_tokenizer_is_named(metadata: dict[str, object]) -> None:
    metadata["tokenizer.ggml.pre"] = "esperanto"
    with pytest.raises(UnsupportedModel, match=r"'esperanto'.*knows .*smollm.*--model_path"):
        from_metadata(metadata)
    del metadata["tokenizer.ggml.pre"]
    with pytest.raises(UnsupportedModel, match="pre-tokenizer None"):
        from_metadata(metadata)


def test_another_kind_of_vocabulary_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"'bert'.*knows gpt2, llama.*--model_path"):
        from_metadata({"tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize("missing", ["tokens", "merges", "token_type"])
def test_a_missing_array_is_named(metadata: dict[str, object], missing: str) -> None:
    del metadata[f"tokenizer.ggml.{missing}"]
    with pytest.raises(GGUFError, match=rf"tokenizer.ggml.{missing} is missing"):
        from_metadata(metadata)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("merges", ["nospace"], "merge 'nospace' is not two tokens"),
        ("merges", ["never seen"], "merges do not fit its tokens"),
        ("token_type", [1, 1], "token_type has 2 entries"),
        ("eos_token_id", 10**6, "eos_token_id is 1000000"),
        ("eos_token_id", "two", "eos_token_id is 'two'"),
    ],
)
def test_metadata_that_contradicts_itself(metadata: dict[str, object], key: str, value: object, words: str) -> None:
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(GGUFError, match=words):
        from_metadata(metadata)


def test_a_model_without_a_vocabulary_gets_bytes(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = from_metadata({"general.architecture": "llama", "llama.vocab_size": 320, "tokenizer.ggml.eos_token_id": 319})
    assert tokenizer.vocab_size == 320
    assert tokenizer.encode("hi<300>") == [104, 105, 300]
    assert tokenizer.stop_ids == {319}
    assert "no tokenizer" in caplog.text
    assert from_metadata({"tokenizer.ggml.model": "none"}).vocab_size == 256


@pytest.mark.parametrize("text", STRINGS)
def test_a_directory_overrides_the_metadata(trained: Trained, directory: Path, text: str) -> None:
    tokenizer = load_tokenizer({"tokenizer.ggml.model": "llama"}, directory)
    assert tokenizer.encode(text) == trained.original.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_directorys_ends(directory: Path) -> None:
    tokenizer = from_directory(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, False)
    assert tokenizer.stop_ids == {0, 2, 80}
    (directory / "tokenizer_config.json").unlink()
    (directory / "generation_config.json").unlink()
    bare = from_directory(directory)
    assert (bare.bos_id, bare.eos_id) == (None, None)
    assert bare.stop_ids == {0, 2}


def test_a_directorys_post_processor_tells_about_bos(trained: Trained, directory: Path) -> None:
    with_bos = tokenizers.Tokenizer.from_str(trained.original.to_str())
    with_bos.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    with_bos.save(str(directory / "tokenizer.json"))
    assert from_directory(directory).encode_prompt("hi")[0] == 1
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": False}))
    assert from_directory(directory).add_bos is False


def test_a_directory_without_tokenizer_json_goes_through_transformers(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    vocab = {token: token_id for token, token_id in trained.original.get_vocab().items() if "think>" not in token}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = trained.metadata["tokenizer.ggml.merges"]
    assert isinstance(merges, list)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}))
    tokenizer = from_directory(tmp_path)
    assert tokenizer.eos_id == 0
    assert tokenizer.decode(tokenizer.encode("the river and 太阳"), skip_special=False) == "the river and 太阳"


def test_sentencepiece_pieces_of_a_directory(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("\n\n\n", "isolated")
    backend.decoder = decoders.ByteFallback()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = from_directory(tmp_path)
    assert tokenizer.encode("a a\n") == [258, 259, 11]
    assert tokenizer.decode(tokenizer.encode("a a\né")) == "a a\né"


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nowhere is not a directory"):
        from_directory(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=rf"No tokenizer could be read from {tmp_path}\. The directory needs the model's tokenizer\.json\.$"):
        from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"No tokenizer could be read from"):
        from_directory(tmp_path)


def test_configuration_files_that_cannot_be_used(directory: Path) -> None:
    (directory / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"generation_config.json holds no JSON object"):
        from_directory(directory)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config.json is not valid JSON"):
        from_directory(directory)


def test_where_the_template_comes_from(trained: Trained, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = from_metadata(trained.metadata)
    metadata = {"tokenizer.chat_template": "own {{ messages[0].content }}"}
    chat = [{"role": "user", "content": "hi"}]
    assert load_template(metadata, tokenizer).render(chat) == "own hi"
    assert load_template(metadata, tokenizer, directory).render(chat) == "<|im_start|>hi<|im_end|>"
    (directory / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert load_template(metadata, tokenizer, directory).render(chat) == "file hi"
    with caplog.at_level(logging.WARNING):
        assert load_template({}, tokenizer).render(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert "no chat template" in caplog.text


def test_templates_by_name(trained: Trained, directory: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_template({}, from_metadata(trained.metadata), directory)
    assert template.render([]) == "plain"
    assert template.render([], tools=[{"function": {"name": "f"}}]) == "tools"
    assert template.render([{"role": "tool", "content": "x"}]) == "tools"


def test_a_second_template_is_for_chats_with_tools(trained: Trained, directory: Path) -> None:
    tokenizer = from_metadata(trained.metadata)
    listing = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    calling = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}{% endfor %}{% endfor %}"
    own = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": listing + calling}
    assert load_template(own, tokenizer).dialect.known
    assert not load_template({"tokenizer.chat_template": "plain"}, tokenizer).dialect.known
    assert load_template(own, tokenizer).render([], tools=[{"function": {"name": "f"}}]) == "f"
    (directory / "chat_template.jinja").write_text("file")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(f"file {listing}")
    assert load_template(own, tokenizer, directory).render([]) == "file"
    assert load_template(own, tokenizer, directory).render([], tools=[{"function": {"name": "f"}}]).startswith("file ")
