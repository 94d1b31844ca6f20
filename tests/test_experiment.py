"""Starting from a checkpoint (`model.init_from`): torch's numbers, names for what is missing, a sentence for a refusal."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from corpus import write_corpus
from tiny import VOCAB, tiny_config

from fedbert_jax import experiment
from fedbert_jax.config import PRESETS, ModelConfig, from_dict, resolve_model
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.tokenizer import load_tokenizer
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import make_segments
from fedbert_jax.train import train
from fedbert_jax.workdir.paths import Workdir

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijkl")]

MODEL = tiny_config(model=dict(num_layers=2)).model


def torch_model(kind: str, model: ModelConfig | None = None, **settings):
    """A random BERT of transformers, whose biases and LayerNorms are not 0 and 1."""

    class Tokenizer:
        pad_token_id = 0

    config = huggingface.hf_config(model or MODEL, Tokenizer)
    config = {k: v for k, v in config.items() if k not in ("architectures", "dtype")} | settings
    torch.manual_seed(0)
    result = getattr(transformers, kind)(transformers.BertConfig(**config)).eval()
    with torch.no_grad():
        for p in result.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return result


def rename(directory: Path, change) -> None:
    """Writes the checkpoint's tensors again, as changed by `change` (dict -> dict)."""
    file = directory / "model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, file, {"format": "pt"})


@cache
def forward(model: ModelConfig, outputs: int | None = None):
    """(empty parameters, the compiled model: (client, server, tokens, types, mask) -> (h, z, logits))."""
    segments = make_segments(model, outputs=outputs)
    empty = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(segments.init, *[jax.eval_shape(lambda: jax.random.key(0))] * 2)
    )

    @jax.jit
    def apply(client, server, tokens, types, mask):
        batch = MaskedBatch(tokens, None, None, None, types, mask.sum(-1))
        h = segments.embed(client, batch)
        z = segments.transform(server, h, lengths=batch.lengths)
        return h, z, segments.predict(client, z)

    return empty, apply


def inputs(vocab: int = VOCAB):
    """Three padded pairs of sentences: (tokens, segments, attention mask), [3, 14]."""
    at = np.arange(14)[None]
    tokens = np.random.default_rng(0).integers(5, vocab, (3, 14))
    types = (at >= np.array([[5], [7], [2]])).astype(np.int64)
    return tokens, types, (at < np.array([[14], [9], [4]])).astype(np.int64)


def check_equal(directory: Path, reference, names=huggingface.CLIENT, outputs=None) -> list[str]:
    """Imports the directory and compares it with torch, as far as it has the model's parts; returns what was missing."""
    tensors, hf = huggingface.load_tensors(directory)
    assert {v.dtype for v in tensors.values()} == {np.dtype(np.float32)}
    model = dataclasses.replace(MODEL, **huggingface.sizes_of(hf, str(directory)))
    empty, apply = forward(resolve_model(model, hf["vocab_size"]), outputs)
    client, server, missing = huggingface.from_tensors(tensors, *empty, names)
    tokens, types, mask = inputs(hf["vocab_size"])
    h, z, logits = map(np.asarray, apply(client, server, tokens, types, mask))
    with torch.no_grad():
        out = reference(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(types),
            output_hidden_states=True,
        )
    real = mask.astype(bool)
    np.testing.assert_allclose(h[real], out.hidden_states[0].numpy()[real], atol=1e-4)
    np.testing.assert_allclose(z[real], out.hidden_states[-1].numpy()[real], atol=1e-4)
    if outputs:
        np.testing.assert_allclose(logits[:, 0], out.logits.numpy(), atol=1e-4)
    elif not missing:
        theirs = out.logits if "logits" in out else out.prediction_logits
        np.testing.assert_allclose(logits[real], theirs.numpy()[real], atol=1e-4)
    return missing


def sentence(function, *args) -> str:
    """The text of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- every kind of checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM"])
def test_a_checkpoint_with_a_head_gives_torchs_numbers(tmp_path, kind):
    model = torch_model(kind)
    model.save_pretrained(tmp_path)
    assert check_equal(tmp_path, model) == []


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_without_a_head_its_five_tensors_are_named_as_one(tmp_path, kind):
    model = torch_model(kind)
    model.save_pretrained(tmp_path)
    missing = check_equal(tmp_path, model)
    assert sorted(missing) == sorted(huggingface.MLM_HEAD)
    (said,) = huggingface.describe_missing(missing)
    assert said.startswith("the MLM head (5 tensors: ") and "..." not in said


def shorten(tensors):
    return {k.removeprefix("bert."): v for k, v in tensors.items()}


def old_names(tensors):
    old = lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    return {old(k): v for k, v in tensors.items()}


def with_decoder(tensors):
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }


def decoder_only(tensors):
    tied = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
    return {k: v for k, v in with_decoder(tensors).items() if k not in tied}


def other_things(tensors):
    return tensors | {"bert.embeddings.position_ids": torch.arange(16)[None], "cls.seq_relationship.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "change", [shorten, old_names, with_decoder, decoder_only, other_things, lambda t: shorten(old_names(with_decoder(t)))]
)
def test_other_spellings_are_the_same_checkpoint(tmp_path, change):
    model = torch_model("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    before, _ = huggingface.load_tensors(tmp_path)
    rename(tmp_path, change)
    after, _ = huggingface.load_tensors(tmp_path)
    assert after.keys() != before.keys() or change is other_things  # position_ids are no weights
    assert check_equal(tmp_path, model) == []


def test_shards_are_read_by_their_index_alone(tmp_path):
    model = torch_model("BertForMaskedLM")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    (tmp_path / "stray.safetensors").write_bytes(b"no weights")
    assert check_equal(tmp_path, model) == []
    shards[1].unlink()
    said = sentence(huggingface.load_tensors, tmp_path)
    assert f"{tmp_path} lacks {shards[1].name}, which model.safetensors.index.json names" in said
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "no weight_map" in sentence(huggingface.load_tensors, tmp_path)


def test_one_file_is_read_alone(tmp_path):
    model = torch_model("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"no weights")
    (tmp_path / "model.safetensors.index.json").write_text("no json")
    assert check_equal(tmp_path, model) == []
    (tmp_path / "model.safetensors.index.json").unlink()
    os.replace(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    assert "adapter.safetensors, other.safetensors" in sentence(huggingface.load_tensors, tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    assert check_equal(tmp_path, model) == []


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_becomes_float32(tmp_path, kind):
    model = torch_model("BertForMaskedLM").to(getattr(torch, kind))
    model.save_pretrained(tmp_path)
    assert check_equal(tmp_path, model.float()) == []


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=pytest.mark.slow if p in ("base", "large") else ()) for p in PRESETS]
)
def test_every_presets_shape(tmp_path, preset):
    """Real widths, heads and depths (but only four of large's 24 equal layers), with a small vocabulary."""
    sizes = dict(PRESETS[preset], num_layers=min(PRESETS[preset]["num_layers"], 4 if preset == "large" else 12))
    model = resolve_model(ModelConfig(max_position_embeddings=16, vocab_size=100, **sizes), 100)
    reference = torch_model("BertForMaskedLM", model)
    reference.save_pretrained(tmp_path)
    assert check_equal(tmp_path, reference) == []
    forward.cache_clear()


# --- a classifier ----------------------------------------------------------------------------------------------------


def test_a_classifier_keeps_its_pooler_and_its_labels(tmp_path):
    model = torch_model("BertForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    assert check_equal(tmp_path, model, huggingface.CLASSIFIER_CLIENT, 3) == []


def test_a_classifier_for_other_labels_is_lacking_not_wrong(tmp_path):
    torch_model("BertForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    tensors, _ = huggingface.load_tensors(tmp_path)
    segments = make_segments(MODEL, outputs=2)
    fresh = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    client, _, missing = huggingface.from_tensors(tensors, *fresh, huggingface.CLASSIFIER_CLIENT)
    assert missing == list(huggingface.CLASSIFIER)
    assert np.array_equal(client["classifier"]["kernel"], fresh[0]["classifier"]["kernel"])
    assert np.array_equal(client["pooler"]["kernel"].T, tensors["bert.pooler.dense.weight"])
    # A masked-LM checkpoint has neither; its untied decoder doesn't concern a classifier.
    torch_model("BertForMaskedLM").save_pretrained(tmp_path)
    tensors, _ = huggingface.load_tensors(tmp_path)
    tensors["cls.predictions.decoder.weight"] = np.zeros((VOCAB, 16), np.float32)
    _, _, missing = huggingface.from_tensors(tensors, *fresh, huggingface.CLASSIFIER_CLIENT)
    assert [s.split(" (")[0] for s in huggingface.describe_missing(missing)] == ["the pooler", "the classifier"]


@pytest.mark.parametrize("labels, regression", [(("no", "yes"), False), (("score",), True)])
def test_a_saved_classifier_is_transformers_own(tmp_path, labels, regression):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = load_tokenizer(str(tmp_path))
    model = dataclasses.replace(MODEL, hidden_dropout=0.0)
    segments = make_segments(model, outputs=len(labels))
    client, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    huggingface.save(tmp_path / "hf", client, server, model, tokenizer, "card", labels, regression)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()) and theirs.config.num_labels == len(labels)
    assert theirs.config.id2label == dict(enumerate(labels))
    assert theirs.config.problem_type == ("regression" if regression else "single_label_classification")
    assert check_equal(tmp_path / "hf", theirs.eval(), huggingface.CLASSIFIER_CLIENT, len(labels)) == []


# --- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [dict, old_names, shorten])
def test_import_then_export_is_bit_for_bit(tmp_path, change):
    torch_model("BertForMaskedLM").save_pretrained(tmp_path)
    original = {k: v.numpy() for k, v in load_file(tmp_path / "model.safetensors").items()}
    rename(tmp_path, change)
    tensors, _ = huggingface.load_tensors(tmp_path)
    empty, _ = forward(MODEL)
    client, server, _ = huggingface.from_tensors(tensors, *empty)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    huggingface.save(tmp_path / "hf", client, server, MODEL, load_tokenizer(str(tmp_path)), "card")
    again = {k: v.numpy() for k, v in load_file(tmp_path / "hf" / "model.safetensors").items()}
    assert again.keys() == original.keys()
    for name, value in original.items():
        assert value.tobytes() == again[name].tobytes(), name


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    torch_model("BertForMaskedLM").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def imported(directory: Path):
    tensors, hf = huggingface.load_tensors(directory)
    huggingface.sizes_of(hf, str(directory))
    return huggingface.from_tensors(tensors, *forward(MODEL)[0])


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_an_untied_decoder_is_refused(saved, name):
    rename(saved, lambda t: with_decoder(t) | {name: with_decoder(t)[name] + 1e-3})
    assert f"{name} differs from its" in sentence(imported, saved)


def test_other_sizes_are_refused_with_both(saved):
    rename(saved, lambda t: t | {"bert.encoder.layer.1.intermediate.dense.weight": torch.zeros(48, 16)})
    assert "layer.1.intermediate.dense.weight has shape (48, 16), the model's has (32, 16)" in sentence(imported, saved)
    rename(saved, lambda t: t | {"bert.encoder.layer.4.output.dense.bias": torch.zeros(16)})
    assert "has 5 layers, the model has 2" in sentence(imported, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize(
    "name", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.LayerNorm.gamma", "cls.predictions.bias"]
)
def test_weights_that_are_not_finite_are_refused_by_name(saved, name, value):
    """So are numbers too large for float32; the name is the one in the file."""

    def spoil(tensors):
        tensors = {k.replace("output.LayerNorm.weight", "output.LayerNorm.gamma"): v.double() for k, v in tensors.items()}
        tensors[name].reshape(-1)[2:4] = value
        return tensors

    rename(saved, spoil)
    said = sentence(imported, saved)
    assert f"not finite (NaN, infinite, or too large for float32) in {name} (2 of " in said


def test_all_that_is_not_finite_is_counted_and_what_is_not_taken_may_be_anything(saved):
    rename(saved, lambda t: t | {"cls.seq_relationship.weight": torch.full((2, 16), float("nan"))})
    imported(saved)
    rename(saved, lambda t: {k: torch.full_like(v, float("nan")) for k, v in t.items()})
    tensors, _ = huggingface.load_tensors(saved)
    assert f"and {len(tensors) - 1 - 5:,} more tensors" in sentence(imported, saved)
    rename(saved, lambda t: with_decoder({k: torch.zeros_like(v) for k, v in t.items()}))
    rename(saved, lambda t: t | {"cls.predictions.decoder.weight": t["cls.predictions.decoder.weight"] + float("nan")})
    assert "too large for float32) in cls.predictions.decoder.weight" in sentence(imported, saved)
    huggingface.check_finite(huggingface.load_tensors(saved)[0], huggingface.CLASSIFIER_CLIENT)  # it has no decoder


def test_a_checkpoint_of_nothing_is_refused(saved):
    rename(saved, lambda t: {f"base_model.model.{k}": v for k, v in t.items()})
    assert "no tensor of a BERT's names; it has base_model.model.bert.embeddings.LayerNorm.bias" in sentence(imported, saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_off_file_is_named(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} can't be read: it is damaged or not all there" in sentence(huggingface.load_tensors, saved)


def test_a_damaged_header_and_an_unknown_type_are_named(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"}" * 40 + whole[48:])
    assert f"{file} can't be read" in sentence(huggingface.load_tensors, saved)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{file} can't be read" in sentence(huggingface.load_tensors, saved)
    save_file({"a.bias": torch.ones(2).to(torch.float8_e4m3fn)}, file)
    assert f"{file} has weights of type F8_E4M3; accepted" in sentence(huggingface.load_tensors, saved)
    save_file({"position_ids": torch.ones(2, dtype=torch.int64), "a.weight": torch.ones(2, dtype=torch.int8)}, file)
    assert f"{file} has weights of type I8; accepted" in sentence(huggingface.load_tensors, saved)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_none_is_named(saved, text):
    (saved / "config.json").write_text(text, encoding="latin-1")
    assert f"{saved / 'config.json'} " in sentence(huggingface.load_tensors, saved)
    (saved / "config.json").unlink()
    assert "no config.json" in sentence(huggingface.load_tensors, saved)


class Trap:
    """When unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_unopened(saved, tmp_path):
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    huggingface.load_tensors(saved)
    (saved / "model.safetensors").unlink()
    sentence(huggingface.load_tensors, saved)
    assert not (tmp_path / "opened").exists()


@pytest.mark.slow
def test_the_command_that_converts_pickled_weights_does(saved, tmp_path):
    before, _ = huggingface.load_tensors(saved)
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    said = sentence(huggingface.load_tensors, saved)
    _, start, command = said.partition("python -c ")
    assert start and "never read" in said
    subprocess.run(f'"{sys.executable}" -c {command}', shell=True, check=True, capture_output=True)
    after, _ = huggingface.load_tensors(saved)
    assert after.keys() == before.keys() and all(np.array_equal(after[k], before[k]) for k in before)


# --- through a run ---------------------------------------------------------------------------------------------------


def run_config(directory: Path, **changes):
    values = dict(
        model=dict(init_from=str(directory), unroll_layers=False),
        data=dict(tokenizer="", seq_len=16),
        federated=dict(local_steps=1, batch_size=2, rounds=1),
    )
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return from_dict(values)


def test_a_run_takes_sizes_and_tokenizer_and_names_what_is_missing(tmp_path):
    directory = tmp_path / "bert"
    torch_model("BertModel").save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    text = write_corpus(tmp_path / "corpus", clients=2, documents=6).parent / "text"
    config = run_config(directory, data=dict(source=f"text:{text}"))
    built = experiment.build(config, Workdir(tmp_path / "w"))
    assert built.dataset.vocab_size == len(WORDS) and built.config.model.vocab_size == VOCAB
    assert (built.config.model.hidden_size, built.config.model.num_heads) == (16, 2)
    state, missing = experiment.initial_state(built)
    assert len(missing) == 1 and missing[0].startswith("the MLM head (5 tensors: ")
    client, server = built.simulation.model_of(state, 0)
    tensors, _ = huggingface.load_tensors(directory)
    theirs = tensors["embeddings.word_embeddings.weight"]
    assert np.array_equal(client["embeddings"]["word"]["embedding"], theirs)
    assert np.array_equal(server["layers"]["up"]["bias"][1], tensors["encoder.layer.1.intermediate.dense.bias"])


@pytest.mark.parametrize("begins, secret, warned", [(True, 5, True), (True, None, False), (False, 5, False)])
def test_a_secret_that_hides_nothing_of_a_checkpoint_is_no_secret(begins, secret, warned, tmp_path):
    directory, said = tmp_path / "bert", list[str]()
    torch_model("BertForMaskedLM").save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    text = write_corpus(tmp_path / "corpus", clients=2, documents=6).parent / "text"
    model = {} if begins else dict(init_from="", hidden_size=16, num_layers=1, num_heads=2)
    data = dict(source=f"text:{text}", tokenizer="" if begins else str(directory))
    config = run_config(directory, model=model, data=data, privacy=dict(client_seed=secret))
    run = experiment.open_run(config, Workdir(tmp_path / "w"), progress=None, warn=said.append)
    run.simulation.close()
    assert any("privacy.client_seed doesn't hide the segment" in sentence for sentence in said) == warned


def test_what_can_t_be_started_from_is_refused_before_text_is_read(saved, tmp_path):
    rename(saved, lambda t: t | {"cls.predictions.bias": t["cls.predictions.bias"] / 0})
    config = run_config(saved, data=dict(source=f"text:{tmp_path / 'nowhere'}"))
    said = sentence(train, config, tmp_path / "w")
    assert said.startswith("config key model.init_from: the checkpoint has numbers that are not finite")
    assert "cls.predictions.bias (61 of 61)" in said and not (tmp_path / "w" / "config.json").exists()
    (saved / "model.safetensors").unlink()
    said = sentence(train, config, tmp_path / "other")  # the first run's lock is held as long as its error is
    assert said.startswith(f"config key model.init_from: {saved} holds no model.safetensors")


def test_an_export_of_a_run_that_began_with_a_checkpoint_has_its_dropout(saved, tmp_path):
    config = experiment.resolve(run_config(saved), VOCAB)
    assert (config.export.hidden_dropout, config.export.attention_dropout) == (0.1, 0.1)
    hf = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(hf | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0}))
    config = experiment.resolve(run_config(saved), VOCAB)
    assert (config.export.hidden_dropout, config.export.attention_dropout) == (0.3, None)
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.0, 0.0)  # the run's own is what was asked for
    own = experiment.resolve(run_config(saved, model=dict(hidden_dropout=0.2), export=dict(attention_dropout=0.0)), VOCAB)
    assert (own.export.hidden_dropout, own.export.attention_dropout) == (None, 0.0)
    assert own.export.base_model == ""  # a directory


def test_what_a_run_refuses_before_it_reads_weights(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    assert experiment.resolve(run_config(saved), VOCAB).model.hidden_size == 16
    said = sentence(experiment.resolve, run_config(saved), VOCAB + 1)
    assert "model.vocab_size=61" in said and str(saved) in said and "at least 62" in said
    with pytest.raises(ConfigError, match=r"model\.hidden_size=32: accepted with model\.init_from: 16"):
        experiment.resolve(run_config(saved, model=dict(hidden_size=32)), VOCAB)
    with pytest.raises(ConfigError, match=r"data\.seq_len=32.*max_position_embeddings=16"):
        experiment.resolve(run_config(saved, data=dict(seq_len=32)), VOCAB)
    hf = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(hf | {"model_type": "distilbert"}))
    assert f"{saved} is a DistilBERT checkpoint" in sentence(experiment.resolve, run_config(saved), VOCAB)
    assert "is a file; accepted: its directory" in sentence(huggingface.local, str(saved / "config.json"))
    assert "no such directory" in sentence(huggingface.local, str(tmp_path / "nowhere"))


def test_a_hub_model_with_pickled_weights_only(saved, monkeypatch):
    import huggingface_hub

    (saved / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(saved))
    said = sentence(huggingface.local, "someone/bert-old")
    assert "BertForMaskedLM.from_pretrained('someone/bert-old').save_pretrained('bert-old')" in said
    assert "AutoTokenizer.from_pretrained('someone/bert-old').save_pretrained('bert-old')" in said


# --- a vocabulary alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [False, True])
def test_a_vocabulary_alone_is_berts_tokenizer(tmp_path, config):
    words = [*WORDS[:5], "[unused0]", "hello", "##s", "cafe", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("Hellos, CAFÉ")["input_ids"] == [2, 6, 7, 9, 8, 3]
    assert len(tokenizer) == len(words) and tokenizer.model_max_length == 512
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))("Hellos, CAFÉ")["input_ids"] == [2, 6, 7, 9, 8, 3]


def test_a_cased_vocabulary_keeps_its_case(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:5], "Paris", "paris"]))
    assert load_tokenizer(str(tmp_path))("Paris paris")["input_ids"] == [2, 5, 6, 3]


def test_a_vocabulary_that_is_no_berts_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("<s>\n</s>\nhello\n")
    assert "lacks [PAD], [UNK], [CLS], [SEP], [MASK]" in sentence(load_tokenizer, str(tmp_path))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in sentence(load_tokenizer, str(tmp_path))
