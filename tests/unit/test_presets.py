import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.data import presets
from rlhf_ray.data.presets import PRESETS, Preset, PresetError, hutto, prepare
from rlhf_ray.data.presets.packages import PinnedPackage, extract, fetch, verify
from rlhf_ray.data.presets.smollm2 import read_config, save_model, unpermute_rows
from rlhf_ray.failures import BadInput


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Writing once and atomically


@pytest.fixture
def builds(monkeypatch):
    """A preset `fake` of two files; the list has one entry for each time it was built."""
    done = []

    def build(archive, target, report):
        (target / "sub").mkdir()
        (target / "sub" / "a.txt").write_text("a")
        (target / "b.txt").write_text("b")
        done.append(target)
        return {}

    monkeypatch.setitem(PRESETS, "fake", Preset(1, None, build))
    return done


def test_a_complete_folder_is_left_as_it_is(tmp_path, builds):
    lines = []
    place = prepare("fake", tmp_path / "data", lines.append)
    before = contents(place)
    assert prepare("fake", tmp_path / "data", lines.append) == place == tmp_path / "data" / "fake"
    assert len(builds) == 1
    assert contents(place) == before
    assert "already" in lines[-1]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["fake"]


@pytest.mark.parametrize("damage", ["missing", "cut", "old", "manifest"])
def test_an_incomplete_or_older_folder_is_built_again(tmp_path, builds, monkeypatch, damage):
    place = prepare("fake", tmp_path, print)
    good = contents(place)
    if damage == "missing":
        (place / "sub" / "a.txt").unlink()
    elif damage == "cut":
        (place / "b.txt").write_text("")
    elif damage == "manifest":
        (place / "preset.json").write_text('{"preset": "fa')
    else:
        monkeypatch.setitem(PRESETS, "fake", replace(PRESETS["fake"], format_version=2))
        good["preset.json"] = good["preset.json"].replace(b'"format_version": 1', b'"format_version": 2')
    prepare("fake", tmp_path, print)
    assert len(builds) == 2
    assert contents(place) == good
    assert [path.name for path in tmp_path.iterdir()] == ["fake"]


def test_a_folder_with_something_else_is_not_touched(tmp_path, builds):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds something else"):
        prepare("fake", tmp_path, print)
    assert contents(tmp_path / "fake") == {"mine.txt": b"mine"}


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def build(archive, target, report):
        (target / "half.txt").write_text("half")
        raise PresetError("no more")

    monkeypatch.setitem(PRESETS, "fake", Preset(1, None, build))
    with pytest.raises(PresetError):
        prepare("fake", tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_a_rebuild_that_fails_keeps_what_was_there(tmp_path, builds, monkeypatch):
    place = prepare("fake", tmp_path, print)
    before = contents(place)

    def build(archive, target, report):
        raise PresetError("no more")

    monkeypatch.setitem(PRESETS, "fake", Preset(2, None, build))
    with pytest.raises(PresetError):
        prepare("fake", tmp_path, print)
    assert contents(place) == before


def test_an_unknown_preset_names_the_known_ones(tmp_path):
    with pytest.raises(BadInput, match="smollm2-135m, minilm, hutto-movie, chain-sum, tiny"):
        prepare("smollm", tmp_path, print)


# Packages


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package that pip finds in a local folder and nowhere else."""
    folder = tmp_path / "links"
    folder.mkdir()
    path = folder / "carried_files-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carried_files/data.txt", "data")
        archive.writestr(
            "carried_files-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried-files\nVersion: 1.0\n"
        )
        archive.writestr(
            "carried_files-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("carried_files-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return path


def package_of(path, **changes):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PinnedPackage(
        **{"name": "carried-files", "version": "1.0", "filename": path.name, "sha256": digest, **changes}
    )


def test_pip_fetches_the_pinned_file(wheel, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    archive = fetch(package_of(wheel), target)
    assert archive.read_bytes() == wheel.read_bytes()
    extract(archive, {"carried_files/data.txt": tmp_path / "out" / "renamed.txt"})
    assert (tmp_path / "out" / "renamed.txt").read_text() == "data"


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"version": "1.1"}])
def test_a_wrong_hash_or_version_is_refused_with_pips_words(wheel, tmp_path, changes):
    with pytest.raises(
        PresetError, match=r"(?s)pip could not download carried-files.*(HASHES|No matching distribution)"
    ):
        fetch(package_of(wheel, **changes), tmp_path)


def test_a_wrong_hash_stops_the_preset(wheel, tmp_path, monkeypatch):
    def build(archive, target, report):
        raise AssertionError("must not be built")

    monkeypatch.setitem(PRESETS, "fake", Preset(1, package_of(wheel), build))
    monkeypatch.setattr(presets, "fetch", lambda package, folder: verify(wheel, package) or wheel)
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(PresetError, match=f"{wheel.name} has SHA-256 .* was expected"):
        prepare("fake", tmp_path / "data", print)
    assert not (tmp_path / "data" / "fake").exists()


def test_a_download_has_a_deadline(wheel, tmp_path):
    with pytest.raises(PresetError, match=r"did not download carried-files 1\.0 within"):
        fetch(package_of(wheel), tmp_path, timeout_s=0.001)


def test_a_missing_member_is_named(wheel, tmp_path):
    with pytest.raises(PresetError, match="has no file carried_files/other"):
        extract(wheel, {"carried_files/other": tmp_path / "x"})


# SmolLM2


def permuted(weight, num_heads):
    """What llama.cpp's converter does to query and key projections."""
    rows, hidden = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def test_unpermute_is_the_inverse_of_the_converter():
    weight = np.arange(3 * 8 * 5, dtype=np.float32).reshape(24, 5)
    assert not np.array_equal(permuted(weight, 3), weight)
    assert np.array_equal(unpermute_rows(permuted(weight, 3), 3), weight)


@pytest.mark.parametrize("drop", [None, "blk.0.ffn_up.weight"])
def test_a_small_gguf_file_becomes_the_model_it_was_made_from(tmp_path, drop):
    import torch
    from gguf import GGUFReader, GGUFWriter
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).to(torch.bfloat16))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    layer = "model.layers.0."
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "blk.0.attn_q.weight": permuted(state[layer + "self_attn.q_proj.weight"], 4),
        "blk.0.attn_k.weight": permuted(state[layer + "self_attn.k_proj.weight"], 2),
        "blk.0.attn_v.weight": state[layer + "self_attn.v_proj.weight"],
        "blk.0.attn_output.weight": state[layer + "self_attn.o_proj.weight"],
        "blk.0.ffn_gate.weight": state[layer + "mlp.gate_proj.weight"],
        "blk.0.ffn_up.weight": state[layer + "mlp.up_proj.weight"],
        "blk.0.ffn_down.weight": state[layer + "mlp.down_proj.weight"],
        "blk.0.attn_norm.weight": state[layer + "input_layernorm.weight"],
        "blk.0.ffn_norm.weight": state[layer + "post_attention_layernorm.weight"],
    }
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_vocab_size(40)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        if name != drop:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = GGUFReader(tmp_path / "model.gguf")
    if drop:
        with pytest.raises(PresetError, match=r"lacks .*up_proj"):
            save_model(reader, read_config(reader, pad_token_id=0), tmp_path / "out")
        return
    save_model(reader, read_config(reader, pad_token_id=0), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.config.rms_norm_eps, loaded.config.pad_token_id, loaded.config.eos_token_id) == (1e-5, 0, 2)


# Hutto


def rated(*snippets):
    """The two files of the data set for (text, ratings) in the order of ids."""
    texts, ratings = [], []
    for number, (text, scores) in enumerate(snippets, start=1):
        mean = sum(scores) / len(scores)
        texts.append(f"{number}\t{mean:.11g}\t{text}")
        ratings.append(f"{number}\t{mean:.10g}\t0.5\t{list(scores)}")
    return "\r\n".join(texts), "\r\n".join(ratings)


def test_snippets_are_cleaned_joined_and_checked():
    texts, ratings = rated(
        ("A ''fine''  film &amp; more", [3, 2, 2]), ("Bad film", [-1, -2]), ("Good", [1]), ("Bad  film", [-3])
    )
    snippets = hutto.read_snippets(texts.replace("3\t1\tGood", "3\t1.5\tGood"), ratings)
    assert [(s.id, s.text, s.ratings) for s in snippets.kept] == [
        (1, 'A "fine" film & more', (3, 2, 2)),
        (2, "Bad film", (-1, -2)),
    ]
    assert (snippets.num_disagreeing, snippets.num_duplicates) == (1, 1)


def test_the_soft_label_is_the_share_of_rater_pairs():
    assert hutto.share_preferring([2, 1], [1, -1]) == pytest.approx(3.5 / 4)
    assert hutto.share_preferring([0], [0, 0]) == 0.5


def test_pairs_take_the_longest_common_opening():
    texts, ratings = rated(
        ("The film is great fun", [3, 3]),
        ("The film is no fun", [-3, -1]),
        ("The film is fair fun", [3, 2]),
        ("The actor sings", [2, 2]),
        ("the lower case", [-4, -4]),
        ("The film", [-4, -4]),
    )
    rows = hutto.pairs(hutto.read_snippets(texts, ratings).kept, max_per_snippet=9)
    found = {(row["id_chosen"], row["id_rejected"]): row for row in rows}
    # 5 has another case; 6 ends where it would part from 1, 2 and 3; the means of 1 and 3, 3 and 4 are 0.5 apart.
    assert set(found) == {(1, 2), (3, 2), (1, 3), (1, 4), (3, 4), (4, 2), (4, 6)}
    row = found[1, 2]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("The film is", " great fun", " no fun")
    assert (row["gap"], row["chosen_probability"], row["source"]) == (5.0, 1.0, "hutto-movie")
    assert found[4, 2]["prompt"] == "The"


@pytest.fixture(scope="module")
def hutto_folder(tmp_path_factory):
    """The preset built from a handmade archive of 600 snippets."""
    root = tmp_path_factory.mktemp("hutto")
    draw = np.random.default_rng(0)
    words = ["film", "story", "cast", "plot", "music", "joke", "scene", "hero"]
    snippets = []
    for number in range(600):
        text = " ".join(
            [draw.choice(["A", "The", "This"]), *draw.choice(words, size=int(draw.integers(2, 9))), str(number)]
        )
        snippets.append((text, [int(score) for score in draw.integers(-4, 5, size=5)]))
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, text in zip((hutto.TEXT_MEMBER, hutto.RATINGS_MEMBER), rated(*snippets), strict=True):
            add(tar, name, text.encode())
    with tarfile.open(root / hutto.PACKAGE.filename, mode="w:gz") as tar:
        add(tar, hutto.OUTER_MEMBER, inner.getvalue())
    target = root / "result"
    target.mkdir()
    details = hutto.build(root / hutto.PACKAGE.filename, target, print)
    return target, details


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_no_snippet_is_on_both_sides(hutto_folder):
    folder, details = hutto_folder
    train, test = ({row["id"] for row in lines_of(folder, f"prompts_{side}.jsonl")} for side in ("train", "test"))
    train |= {row["id"] for row in lines_of(folder, "sft_train.jsonl")}
    sides = {"train": train, "test": test}
    for side, limit in hutto.MAX_PAIRS_PER_SNIPPET.items():
        uses = Counter(
            row[f"id_{role}"] for row in lines_of(folder, f"pairs_{side}.jsonl") for role in ("chosen", "rejected")
        )
        assert uses
        assert max(uses.values()) <= limit
        sides[side] |= uses.keys()
    assert not sides["train"] & sides["test"]
    assert details["rows"]["pairs_train"] == len(lines_of(folder, "pairs_train.jsonl"))
    assert 30 <= details["snippets"]["test"] <= 90


def test_prompts_are_four_words_once_and_test_ones_are_new(hutto_folder):
    folder, _ = hutto_folder
    train, test = ([row["prompt"] for row in lines_of(folder, f"prompts_{side}.jsonl")] for side in ("train", "test"))
    assert train
    assert test
    assert all(len(prompt.split(" ")) == 4 for prompt in train + test)
    assert len(set(train + test)) == len(train) + len(test)


def test_every_held_out_snippet_has_its_mean_rating(hutto_folder):
    folder, details = hutto_folder
    rows = lines_of(folder, "snippets_test.jsonl")
    source = hutto.read_snippets(*((folder.parent / f"{name}.txt").read_text() for name in ("text", "ratings")))
    assert rows == [
        {"id": snippet.id, "text": snippet.text, "rating": sum(snippet.ratings) / 5}
        for snippet in sorted(source.kept, key=lambda snippet: snippet.id)
        if snippet.side == "test"
    ]
    assert details["rows"]["snippets_test"] == details["snippets"]["test"] == len(rows)
    by_id = {row["id"]: row for row in rows}
    for row in lines_of(folder, "pairs_test.jsonl"):
        chosen, rejected = by_id[row["id_chosen"]], by_id[row["id_rejected"]]
        assert row["prompt"] + row["chosen"] == chosen["text"]
        assert chosen["rating"] - rejected["rating"] == pytest.approx(row["gap"], abs=1e-6)


def test_pairs_add_up_to_snippets(hutto_folder):
    folder, _ = hutto_folder
    texts = {row["id"]: row["text"] for row in lines_of(folder, "sft_train.jsonl")}
    rows = lines_of(folder, "pairs_train.jsonl")
    for row in rows:
        for role in ("chosen", "rejected"):
            assert row[role].startswith(" ")
            if row[f"id_{role}"] in texts:
                assert row["prompt"] + row[role] == texts[row[f"id_{role}"]]
        assert row["gap"] >= hutto.MIN_GAP
    assert len({frozenset((row["id_chosen"], row["id_rejected"])) for row in rows}) == len(rows)


# Tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return prepare("tiny", tmp_path_factory.mktemp("data"), print)


def test_tiny_is_the_same_bytes_every_time(tiny, tmp_path):
    first, second = contents(tiny), contents(prepare("tiny", tmp_path, print))
    assert first == second
    counts = {name: len(lines_of(tiny, name)) for name in first if name.endswith(".jsonl")}
    assert counts == {
        "prompts.jsonl": 64,
        "prompts_test.jsonl": 16,
        "pairs_train.jsonl": 128,
        "pairs_test.jsonl": 32,
        "sft_train.jsonl": 64,
    }


def test_tiny_models_load_and_tell_texts_apart(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "reward_model")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    texts = [row["text"] for row in lines_of(tiny, "sft_train.jsonl")][:8]
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model")
    with torch.no_grad():
        scores = [reward_model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert np.std(scores) > 0.1
    policy = AutoModelForCausalLM.from_pretrained(tiny / "policy")
    assert policy.config.vocab_size == len(tokenizer)
    assert policy.config.max_position_embeddings == tokenizer.model_max_length == 256
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in texts)


def test_tiny_data_loads_with_the_loaders(tiny):
    from transformers import AutoTokenizer

    from rlhf_ray.config.reward_model import PreferenceSettings
    from rlhf_ray.config.settings import PromptSettings, TextSettings
    from rlhf_ray.data.preferences import load_preferences
    from rlhf_ray.data.prompts import load_prompts
    from rlhf_ray.data.text import load_text

    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    for side in ("train", "test"):
        pairs = load_preferences(PreferenceSettings(path=str(tiny / f"pairs_{side}.jsonl")), tokenizer, "pairs.path")
        assert pairs.pairs[0].chosen.startswith(" ")
    load_text(TextSettings(path=str(tiny / "sft_train.jsonl")), tokenizer, 512)
    train, test = (
        load_prompts(
            PromptSettings(path=str(tiny / name)), tokenizer, max_prompt_tokens=32, context_tokens=256,
            max_response_tokens=64, key="prompts.path", section="sampling",
        )
        for name in ("prompts.jsonl", "prompts_test.jsonl")
    )  # fmt: skip
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in test}


def test_sums_have_their_own_entry_as_label_and_no_problem_is_on_both_sides(tmp_path):
    pytest.importorskip("reasoning_gym")
    place = prepare("chain-sum", tmp_path, print)
    sides = {
        side: [json.loads(line) for line in (place / f"prompts_{side}.jsonl").read_text().splitlines()]
        for side in ("train", "test")
    }
    assert {side: len(rows) for side, rows in sides.items()} == {"train": 1024, "test": 64}
    rows = [row for side in sides.values() for row in side]
    assert len({row["label"]["question"] for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": row["label"]["question"]}]
        assert eval(row["label"]["metadata"]["expression"]) == int(row["label"]["answer"])


def test_sums_without_their_package_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(PresetError, match=r"pip install 'rlhf-ray\[verifiable\]'"):
        prepare("chain-sum", tmp_path, print)
    assert not (tmp_path / "chain-sum").exists()
