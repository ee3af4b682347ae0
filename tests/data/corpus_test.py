import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from jax_entropy import data
from jax_entropy.data import builder, corpus, packing, sources
from jax_entropy.data.tokenizer import load_tokenizer, train_tokenizer
from jax_entropy.errors import UserError
from tests import REPOSITORY
from tests.damage import flip
from tests.data.helpers import data_config, script, write_folder

T = 16


def prepare(tmp_path, context_length=T, notify=print, **overrides):
    overrides = {"files": str(tmp_path / "text")} | overrides
    return data.prepare(data_config(tmp_path / "home", **overrides), context_length, notify)


def files_of(prepared):
    return [path for path in prepared.directory.rglob("*") if path.is_file()]


def rows(prepared, split):
    return np.stack([chunk["tokens"] for chunk in prepared.chunks(split)])


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if path.suffix != ".lock")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "text", count=60)


@pytest.fixture
def builds(monkeypatch):
    made, build = [], corpus._build
    monkeypatch.setattr(corpus, "_build", lambda *request: made.append(request[1]) or build(*request))
    return made


def test_chunks_are_those_of_the_packed_documents(tmp_path, folder):
    prepared = prepare(tmp_path)
    paths = sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())
    held = {path for path in paths if packing._hash(path.relative_to(folder).as_posix()) < 0.05}
    assert held
    for split, chosen in (("train", set(paths) - held), ("validation", held)):
        expected = [
            ids[i : i + T + 1]
            for ids in (prepared.tokenizer.encode(path.read_text()) for path in paths if path in chosen)
            for i in range(0, len(ids) - T, T)
        ]
        assert rows(prepared, split).tolist() == expected
        assert getattr(prepared, f"num_{split}_chunks") == len(expected)


def test_metadata_counts_what_is_there(tmp_path, folder):
    prepared = prepare(tmp_path)
    metadata, lengths = prepared.metadata, prepared.tokenizer.byte_lengths()
    assert (
        metadata["identity"]["content"]
        == sources.open_documents(data_config(tmp_path / "home", files=str(folder)), tmp_path).digest
    )
    assert metadata["vocab_size"] == prepared.tokenizer.vocab_size <= 400
    assert metadata["python"] == ".".join(map(str, sys.version_info[:3]))
    for split in ("train", "validation"):
        chunks = rows(prepared, split)
        assert metadata[split]["tokens"] == chunks[:, 1:].size
        assert metadata[split]["bytes"] == lengths[chunks[:, 1:]].sum()
        assert metadata[split]["bytes_per_token"] == metadata[split]["bytes"] / metadata[split]["tokens"]
    assert metadata["train"]["documents"] + metadata["validation"]["documents"] == 60


def test_it_is_a_versioned_data_set_that_needs_no_tensorflow(tmp_path, folder):
    prepared = prepare(tmp_path)
    info = json.loads((prepared.directory / "files" / builder.VERSION / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("files", builder.VERSION, "array_record")
    assert info["description"] == sources.SOURCES["files"].description
    assert prepared.chunks("train")[0]["tokens"].dtype == np.uint16
    assert "tensorflow" not in sys.modules
    assert load_tokenizer(prepared.directory / "tokenizer.json").digest() == prepared.tokenizer.digest()
    assert not list(prepared.directory.glob("*.tokens"))


def test_large_splits_are_written_in_shards_in_order(tmp_path, folder, monkeypatch):
    expected = rows(prepare(tmp_path), "train")
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setattr(builder, "SHARD_BYTES", 3000)
    prepared = prepare(tmp_path)
    assert len(list(prepared.directory.rglob("*train.array_record*"))) > 5
    assert (rows(prepared, "train") == expected).all()


def test_the_same_request_is_answered_from_disk(tmp_path, folder, builds):
    first = prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")}
    second = prepare(tmp_path, num_threads=7, prefetch=3)
    assert len(builds) == 1 and first.fingerprint == second.fingerprint
    assert {path: path.stat().st_mtime_ns for path in second.directory.rglob("*")} == before


def test_every_field_that_decides_the_chunks_makes_a_corpus_of_its_own(tmp_path, folder, builds):
    train_tokenizer([script(i) for i in range(10)], 300).save(tmp_path / "tokenizer.json")
    train_tokenizer([script(i) for i in range(10)], 310).save(tmp_path / "other.json")
    requests = [
        {},
        {"context_length": 17},
        {"vocab_size": 390},
        {"join_documents": True},
        {"validation_fraction": 0.2},
        {"max_documents": 30},
        {"source": "languini"},
        {"tokenizer": str(tmp_path / "tokenizer.json")},
        {"tokenizer": str(tmp_path / "other.json")},
    ]
    prepared = [prepare(tmp_path, **request) for request in requests]
    assert len({p.fingerprint for p in prepared}) == len({p.directory for p in prepared}) == len(requests)
    assert len(builds) == len(requests)
    for request, first in zip(requests, prepared, strict=True):
        again = prepare(tmp_path, **request)
        assert again.directory == first.directory
        assert (rows(again, "train") == rows(first, "train")).all()
    assert len(builds) == len(requests)
    assert prepared[-1].tokenizer.vocab_size == 310


def test_changed_content_is_prepared_again(tmp_path, folder, builds):
    first = prepare(tmp_path)
    path = folder / "package0" / "module00.py"
    path.write_text(path.read_text()[::-1])
    second = prepare(tmp_path)
    assert first.fingerprint != second.fingerprint and len(builds) == 2
    path.write_text(script(0))
    assert prepare(tmp_path).directory == first.directory
    assert len(builds) == 2


def test_standard_library_depends_on_the_python_version(tmp_path, folder, monkeypatch):
    config = data_config(tmp_path, source="stdlib")
    documents = sources.open_documents(data_config(tmp_path, files=str(folder)), tmp_path)
    before = corpus._Request(config, T, documents, None).fingerprint
    monkeypatch.setattr(corpus.platform, "python_version", lambda: "3.99.0")
    assert corpus._Request(config, T, documents, None).fingerprint != before


def test_a_corpus_with_any_byte_changed_is_prepared_again_and_that_is_said(tmp_path, folder, builds):
    first = prepare(tmp_path)
    expected = {path.relative_to(first.directory): path.read_bytes() for path in files_of(first)}
    assert len(expected) == 7
    for count, path in enumerate(expected, start=2):
        (Path.unlink if "info" in path.name else flip)(first.directory / path)
        said = []
        prepare(tmp_path, notify=said.append)
        assert len(builds) == count
        assert len([line for line in said if "damaged" in line]) == 1
        assert repr(str(first.directory)) in said[0] and "is prepared again" in said[0]
        assert path.name in said[0] or path.name == "manifest.sha256"
        assert {path.relative_to(first.directory): path.read_bytes() for path in files_of(first)} == expected


def test_a_corpus_may_lie_in_a_folder_that_nobody_may_write(tmp_path, folder, builds, monkeypatch):
    first = prepare(tmp_path)
    monkeypatch.setattr(corpus.os, "access", lambda path, mode: False)
    assert prepare(tmp_path).directory == first.directory
    with pytest.raises(UserError, match="config.data.directory=.*home' is not writable"):
        prepare(tmp_path, context_length=5)
    assert len(builds) == 1


def test_hashing_that_takes_a_while_says_so(tmp_path, folder, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr(corpus, "_LONG_CHECK_BYTES", 1000)
    said = []
    prepare(tmp_path, notify=said.append)
    assert len(said) == 1 and said[0].startswith("Checking the 0.0 GB of")


def test_two_preparations_in_two_places_are_identical(tmp_path, folder):
    first = prepare(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copytree(folder, tmp_path / "other" / "text")
    second = prepare(tmp_path / "other")
    assert first.fingerprint == second.fingerprint
    files = [path.relative_to(first.directory) for path in first.directory.rglob("*array_record*")]
    assert len(files) == 2
    for name in [*files, "tokenizer.json"]:
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


def test_content_that_changes_while_it_is_read_is_not_kept(tmp_path, folder, monkeypatch):
    def write_chunks(*args, **kwargs):
        (folder / "late.py").write_text("late")
        return original(*args, **kwargs)

    original = packing.write_chunks
    monkeypatch.setattr(packing, "write_chunks", write_chunks)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(tmp_path)
    assert names(tmp_path / "home") == []


def test_what_is_left_out_is_told_and_kept_in_the_metadata(tmp_path, folder):
    (folder / "empty.py").touch()
    (folder / "z\x1b[2J.py").write_bytes(b"\xff")
    (folder / os.fsdecode(b"\xff.png")).touch()
    said = []
    prepared = prepare(tmp_path, notify=said.append)
    (line,) = [line for line in said if line.startswith("Left out")]
    sentence = r"Left out: 1 of another suffix ('\udcff.png'), 1 empty ('empty.py'), 1 not UTF-8 text ('z\x1b[2J.py')"
    assert line == sentence
    assert prepared.metadata["left_out"] == {"of another suffix": 1, "empty": 1, "not UTF-8 text": 1}
    assert (rows(prepare(tmp_path), "train") == rows(prepared, "train")).all()


def test_home_may_have_any_utf_8_name(tmp_path, folder):
    expected = rows(prepare(tmp_path), "train")
    home = tmp_path / "sweep[lr=0.1] *?" / "a\\b {x} %s\nλ"
    for _ in range(2):
        assert (rows(prepare(tmp_path, directory=str(home)), "train") == expected).all()


def test_one_file_holds_out_its_tail(tmp_path):
    (tmp_path / "text").mkdir()
    text = script(0, 2000)
    (tmp_path / "text" / "only.txt").write_text(text)
    prepared = prepare(tmp_path, context_length=8)
    train, validation = (
        prepared.tokenizer.decode([*chunks[0], *chunks[1:, 1:].ravel()])
        for chunks in (rows(prepared, "train"), rows(prepared, "validation"))
    )
    assert text.startswith(train) and validation in text[len(train) :]
    assert 0.04 < len(validation) / len(text) < 0.06


def test_existing_tokenizer_is_used_as_it_is(tmp_path, folder):
    tokenizer = train_tokenizer([script(i) for i in range(10)], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    prepared = prepare(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=9)
    assert prepared.tokenizer.digest() == tokenizer.digest()


def test_a_tokenizer_that_was_trained_on_this_text_finds_the_chunks_that_were_made_with_it(tmp_path, folder, builds):
    trained, given = prepare(tmp_path), str(tmp_path / "given.json")
    shutil.copy(trained.directory / "tokenizer.json", given)
    found = prepare(tmp_path, tokenizer=given)
    assert len(builds) == 1 and found.directory == trained.directory != prepare(tmp_path, T - 1).directory
    expected = rows(found, "train")
    flip(trained.directory / "tokenizer.json", 400)  # what is damaged there is not taken from there
    made = prepare(tmp_path, tokenizer=given)
    assert len(builds) == 3 and made.directory != trained.directory and made.fingerprint == found.fingerprint
    np.testing.assert_array_equal(rows(made, "train"), expected)


def test_local_shards_become_a_corpus(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    (tmp_path / "text").mkdir()
    pyarrow.write_table(pa.table({"content": [script(i) for i in range(300)]}), tmp_path / "text" / "a.parquet")
    prepared = prepare(tmp_path, source="codeparrot", max_documents=200)
    metadata = prepared.metadata
    assert metadata["train"]["documents"] + metadata["validation"]["documents"] == 200
    assert 2 <= metadata["validation"]["documents"] <= 30


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (dict(tokenizer="/no/tokenizer.json"), "config.data.tokenizer: tokenizer '/no/tokenizer.json' does not exist"),
        (dict(context_length=5000), "config.model.context_length=5000 is too long: the longest document of"),
        (dict(context_length=50_000, join_documents=True), "documents of"),
    ],
)
def test_impossible_requests_are_one_sentence_and_leave_nothing(tmp_path, folder, overrides, sentence):
    with pytest.raises(UserError) as error:
        prepare(tmp_path, **overrides)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "home").exists() or names(tmp_path / "home") == []


def test_context_that_only_the_training_side_can_fill_names_the_fraction(tmp_path, folder):
    held = [path for path in folder.rglob("*.py") if packing._hash(path.relative_to(folder).as_posix()) < 0.05]
    assert held
    for path in held:  # as many bytes as before in fewer tokens
        path.write_text("epsilon " * (path.stat().st_size // 8))
    longest = prepare(tmp_path).metadata["validation"]["longest_document"]
    with pytest.raises(UserError, match="validation_fraction=0.05 holds out no text of .* longest has 1.*; raise it"):
        prepare(tmp_path, context_length=longest)


def test_longest_document_in_the_sentence_is_right(tmp_path, folder):
    longest = prepare(tmp_path).metadata["train"]["longest_document"]
    with pytest.raises(UserError, match=f"has {longest} tokens and {longest + 1} are needed"):
        prepare(tmp_path, context_length=longest)


def test_empty_rows_are_no_text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match="every document is empty"):
        prepare(tmp_path, source="languini")


def test_unusable_home_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="config.data.directory=.*file/home cannot be written: Not a directory"):
        prepare(tmp_path, directory=str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match=r"config.data.directory=.*caf\\udce9' is not UTF-8"):
        prepare(tmp_path, directory=os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UserError, match="config.data.directory='s3://corpora' is an address"):
        prepare(tmp_path, directory="s3://corpora")


def fill_the_disk(*args, **kwargs):
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def fill_the_disk_of_array_record(*args, **kwargs):
    raise RuntimeError("write() failed: No space left on device; writing /disk/files-train")


@pytest.mark.parametrize(
    ("owner", "name", "fill"),
    [
        (packing, "write_chunks", fill_the_disk),
        (builder.TokenChunks, "download_and_prepare", fill_the_disk_of_array_record),
        (corpus.manifest, "seal", fill_the_disk),
    ],
)
def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, folder, monkeypatch, owner, name, fill):
    monkeypatch.setattr(owner, name, fill)
    with pytest.raises(UserError, match="config.data.directory=.* cannot be written: No space left on device"):
        prepare(tmp_path)
    assert names(tmp_path / "home") == []


def test_default_home_is_the_users_cache(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prepare(tmp_path, directory="").directory.parent == tmp_path / "cache" / "jax_entropy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert prepare(tmp_path, directory="").directory.parent == tmp_path / "user" / ".cache" / "jax_entropy"


PROGRAM = """
import pathlib, sys, time
from jax_entropy.data import corpus, packing
from tests.data.helpers import data_config

def paused(*args, **kwargs):
    counts = write_chunks(*args, **kwargs)
    print("PAUSED", flush=True)
    while not pathlib.Path(sys.argv[3]).exists():
        time.sleep(0.05)
    return counts

write_chunks, packing.write_chunks = packing.write_chunks, paused
print(corpus.prepare(data_config(sys.argv[1], files=sys.argv[2]), 16).fingerprint, "tensorflow" in sys.modules)
"""


def start(tmp_path):
    command = [sys.executable, "-u", "-c", PROGRAM, *(str(tmp_path / name) for name in ("home", "text", "go"))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(word, process):
    while word not in (line := process.stdout.readline()):
        assert line, "the preparation ended by itself"


def test_what_a_killed_preparation_left_is_removed_by_any_other_but_not_what_is_being_made(tmp_path, folder):
    home = tmp_path / "home"
    for name in ("killed.building", "busy.building"):
        (home / name / "files").mkdir(parents=True)
    with FileLock(home / "busy.lock"):
        prepared = prepare(tmp_path)
    assert names(home) == ["busy.building", prepared.directory.name]


def test_of_processes_that_prepare_one_corpus_one_does_and_another_if_it_is_killed(tmp_path, folder):
    killed = start(tmp_path)
    wait_for("PAUSED", killed)
    (left,) = names(tmp_path / "home")
    assert left.endswith(".building")
    others = [start(tmp_path), start(tmp_path)]
    for process in others:
        wait_for("Waiting for another process", process)
    (tmp_path / "go").touch()
    killed.kill()
    killed.communicate()
    outputs = [process.communicate()[0] for process in others]
    assert [process.returncode for process in others] == [0, 0]
    assert sorted("PAUSED" in output for output in outputs) == [False, True]
    prepared = prepare(tmp_path)
    assert all(f"{prepared.fingerprint} False" in output for output in outputs)
    assert names(tmp_path / "home") == [prepared.directory.name] == [left.removesuffix(".building")]
    elsewhere = prepare(tmp_path, directory=str(tmp_path / "elsewhere"))
    assert (rows(prepared, "train") == rows(elsewhere, "train")).all()


def test_a_user_without_a_name_prepares_a_corpus(tmp_path, folder, monkeypatch):
    def nameless(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    monkeypatch.setattr("grp.getgrgid", nameless)
    assert prepare(tmp_path).num_train_chunks
