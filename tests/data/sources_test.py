import errno
import gzip
import json
import os
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_entropy.data import documents as documents_module
from jax_entropy.data import sources
from jax_entropy.data.documents import Rows, TextFiles
from jax_entropy.data.sources import open_documents
from jax_entropy.errors import UserError
from tests.data.helpers import data_config, write_folder

ROWS = [{"content": f"def f{i}():\n    return {i}\n", "text": f"Book {i}, λ.", "stars": i} for i in range(20)]


def texts(documents) -> dict[str, str]:
    return {document.name: "".join(document.text(0, document.size)) for document in documents}


def opened(tmp_path, files, source="files"):
    return open_documents(data_config(tmp_path / "home", source=source, files=str(files)), tmp_path / "home")


def error_of(tmp_path, files, source="files") -> str:
    with pytest.raises(UserError) as error:
        list(opened(tmp_path, files, source))
    assert "\n" not in str(error.value)
    return str(error.value)


def write_shard(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_standard_library_is_code_without_tests_and_generated_tables(tmp_path):
    documents = opened(tmp_path, "", "stdlib")
    names = [document.name for document in documents]
    assert len(names) > 300 and documents.size > 5e6 and names == sorted(names)
    assert {"dataclasses.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "encodings", "site-packages"} & set(name.split("/"))]
    assert not {"stringprep.py", "pydoc_data/topics.py"} & set(names)


def test_a_python_without_its_source_says_what_to_use_instead(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "os.py").write_text("pass")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    assert "finds only 1 source files" in error_of(tmp_path, "", "stdlib")


def test_folder_gives_text_by_relative_path_and_leaves_the_rest(tmp_path):
    folder = tmp_path / "corpus"
    wanted = {"a.py": "x = 1\n", "b/c.md": "λ\r\n", "b/d.TXT": "\ufefftext", "é.rst": "e"}
    for name, text in wanted.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    for name in (".git/config.txt", "__pycache__/a.py", "node_modules/x/a.js", ".hidden.py", "image.png", "empty.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty.py" else "text")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "cut.txt").write_bytes("é".encode()[:1])
    (folder / "broken.py").symlink_to(folder / "nowhere.py")
    os.mkfifo(folder / "pipe.txt")
    documents = opened(tmp_path, folder)
    assert texts(documents) == wanted
    assert documents.left_out.counts() == {
        "hidden or generated": 4,
        "that are no files": 2,
        "of another suffix": 1,
        "not UTF-8 text": 3,
        "empty": 1,
    }
    assert "3 not UTF-8 text ('cut.txt', …), 1 empty ('empty.py')" in str(documents.left_out)


def test_names_that_are_no_text_are_documents_and_shown_not_obeyed(tmp_path):
    folder = write_folder(tmp_path / "corpus", count=2)
    strange = {os.fsdecode(b"caf\xe9.txt"): "coffee", "a\nb \x1b[31m.txt": "red", "[x]*.txt": "glob"}
    for name, text in strange.items():
        (folder / name).write_text(text)
    (folder / os.fsdecode(b"\xff\x1b[0m")).mkdir()
    (folder / os.fsdecode(b"\xff\x1b[0m") / "deep.txt").write_bytes(b"\xff")
    documents = opened(tmp_path, folder)
    assert {name: text for name, text in texts(documents).items() if "module" not in name} == strange
    assert r"1 not UTF-8 text ('\udcff\x1b[0m/deep.txt')" in str(documents.left_out)
    for name in strange:
        assert texts(opened(tmp_path, folder / name)) == {name: strange[name]}


def test_linked_folders_are_read_once_and_never_back(tmp_path):
    folder = write_folder(tmp_path / "corpus", count=3)
    outside = write_folder(tmp_path / "outside", count=2)
    (outside / "back").symlink_to(tmp_path)
    (folder / "books").symlink_to(outside)
    (folder / "books again").symlink_to(outside / "package0")
    (folder / "loop").symlink_to(folder)
    (folder / "package0" / "sibling").symlink_to(folder / "package1")
    (folder / ".hidden" / "below").mkdir(parents=True)
    (folder / ".hidden" / "below" / "up.py").write_text("read under the name of the link")
    (folder / "shown").symlink_to(folder / ".hidden" / "below")
    documents = opened(tmp_path, folder)
    assert [document.name for document in documents] == [
        *("books again/module00.py", "books/package1/module01.py"),
        *(f"package{i}/module0{i}.py" for i in range(3)),
        "shown/up.py",
    ]
    names = {"loop", "package0/sibling", "books/back", "books/package0"}
    assert set(documents.left_out._names["linked to what is read anyway"]) == names
    for name in ("loop", "books again"):  # Python's glob would follow these for ever
        (outside / "package1" / name).symlink_to(outside)
    found = opened(tmp_path, folder / "**" / "*.py")
    assert texts(found) == texts(documents) and found.digest == documents.digest
    assert names < set(found.left_out._names["linked to what is read anyway"])


@pytest.mark.parametrize(
    "files, source", [("", "files"), ("**/*.txt", "files"), ("*/?.txt", "files"), ("", "languini")]
)
def test_a_file_is_read_once_whatever_links_lead_to_it(tmp_path, files, source):
    """Under its own name, so that a link that is added renames nothing."""
    folder, suffix = tmp_path / "corpus", "txt" if source == "files" else "jsonl"
    for name in ("m/0", "m/1"):
        write_shard(folder / f"{name}.{suffix}", ROWS[:3])
    write_shard(tmp_path / f"outside.{suffix}", ROWS[3:5])
    before = opened(tmp_path, folder / files, source)
    (folder / "a").symlink_to(folder / "m")
    (folder / "z").symlink_to(folder / "m")
    (folder / "m" / f"2.{suffix}").symlink_to(folder / "m" / f"0.{suffix}")
    documents = opened(tmp_path, folder / files, source)
    assert texts(documents) == texts(before) and documents.digest == before.digest
    assert "linked to what is read anyway ('a" in str(documents.left_out)
    for name in ("m/8", "m/9"):
        (folder / f"{name}.{suffix}").symlink_to(tmp_path / f"outside.{suffix}")
    more = texts(opened(tmp_path, folder / files, source))
    assert len(more) == len(texts(before)) + (1 if source == "files" else 2)


def test_what_is_prepared_is_no_text(tmp_path):
    folder = write_folder(tmp_path / "corpus", count=3)
    for name in ("tokenizer.json", "a.txt"):
        (folder / "cache" / "files-0" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cache" / "files-0" / name).write_text('{"text": "prepared"}')
    config = data_config(folder / "cache", files=str(folder))
    documents = open_documents(config, folder / "cache")
    assert len(documents) == 3 and documents.left_out.counts() == {"with prepared corpora": 1}
    config.files = str(folder / "**")
    assert len(open_documents(config, folder / "cache")) == 3
    config.files = str(folder / "cache")
    with pytest.raises(UserError, match="is config.data.directory too"):
        open_documents(config, folder / "cache")


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "corpus", count=3)
    documents = opened(tmp_path, folder)
    (folder / "package1" / "module01.py").unlink()
    with pytest.raises(UserError, match=r"'package1/module01.py' cannot be read: No such file"):
        texts(documents)
    path = folder / "package0" / "module00.py"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"'package0/module00.py' changed while it was read; start again"):
        texts(documents)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert "module00.py' cannot be read: Permission denied" in error_of(tmp_path, folder)
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert f"config.data.files={str(folder)!r} cannot be read: Permission denied" in error_of(tmp_path, folder)


def test_single_file_and_glob_take_any_suffix(tmp_path):
    (tmp_path / "logs" / "deep").mkdir(parents=True)
    for name in ("a.log", "b.log", "deep/c.log", "d.other"):
        (tmp_path / "logs" / name).write_text(name)
    assert texts(opened(tmp_path, tmp_path / "logs" / "a.log")) == {"a.log": "a.log"}
    assert set(texts(opened(tmp_path, tmp_path / "logs" / "*.log"))) == {"a.log", "b.log"}
    assert set(texts(opened(tmp_path, tmp_path / "logs" / "**" / "*.log"))) == {"a.log", "b.log", "deep/c.log"}


def test_files_that_are_added_rename_no_others_of_a_glob(tmp_path):
    folder = tmp_path / "logs"
    for name in ("a/x/0.log", "a/x/1.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    globs = {"**/*.log": "a/x/", "a/**/*.log": "x/", "a/x/*.log": "", "[a]/x/*.log": "a/x/"}
    before = {pattern: texts(opened(tmp_path, folder / pattern)) for pattern in globs}
    assert {pattern: [*names] for pattern, names in before.items()} == {
        pattern: [f"{prefix}0.log", f"{prefix}1.log"] for pattern, prefix in globs.items()
    }
    for name in ("b/2.log", "a/3.log", "a/y/4.log", "a/x/5.log", "6.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for pattern, names in before.items():
        assert names.items() <= texts(opened(tmp_path, folder / pattern)).items()


def test_digest_depends_on_names_and_contents_and_on_nothing_else(tmp_path):
    folder = write_folder(tmp_path / "a", count=3)
    digest = opened(tmp_path, folder).digest
    assert opened(tmp_path, write_folder(tmp_path / "elsewhere", count=3)).digest == digest
    path = folder / "package0" / "module00.py"
    content = path.read_bytes()
    times = path.stat().st_mtime_ns
    path.write_bytes(content.replace(b"e", b"o", 1))
    os.utime(path, ns=(times, times))
    changed = opened(tmp_path, folder).digest
    path.write_bytes(content)
    assert opened(tmp_path, folder).digest == digest
    path.rename(folder / "package0" / "renamed.py")
    assert len({digest, changed, opened(tmp_path, folder).digest}) == 3


def test_files_that_cannot_be_used_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.py").write_bytes(b"\xff\xfe")
    (tmp_path / "binary" / "b.py").write_bytes(b"")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    shard = write_shard(tmp_path / "shards" / "a.jsonl", ROWS)
    assert "config.data.files is empty" in error_of(tmp_path, "")
    assert "matches no file" in error_of(tmp_path, tmp_path / "nowhere")
    assert "matches no file" in error_of(tmp_path, tmp_path / "*.none")
    assert "holds no files; put .py" in error_of(tmp_path, tmp_path / "empty")
    sentence = "has no text, but 1 not UTF-8 text ('a.py'), 1 empty ('b.py')"
    assert sentence in error_of(tmp_path, tmp_path / "binary")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".git").mkdir()
    assert "holds no files, but 1 hidden or generated ('.git'); put" in error_of(tmp_path, tmp_path / "hidden")
    assert "gs://bucket' is an address on a network" in error_of(tmp_path, "gs://bucket")
    assert "none of its 1 files ends in .py" in error_of(tmp_path, tmp_path / "pictures")
    assert "config.data.source='languini'" in error_of(tmp_path, shard.parent)
    for name in ("nowhere", "empty", "binary", "pictures"):
        assert repr(str(tmp_path / name)) in error_of(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "sp [x] *.parquet"])
@pytest.mark.parametrize("source, column", [("codeparrot", "content"), ("languini", "text")])
def test_local_shards_are_read_row_by_row(tmp_path, name, source, column):
    shard = write_shard(tmp_path / "shards" / name, ROWS)
    expected = {str(i): row[column] for i, row in enumerate(ROWS)}
    assert texts(opened(tmp_path, shard, source)) == expected
    assert texts(opened(tmp_path, shard.parent, source)) == expected


def test_shards_follow_one_another_by_name_and_empty_ones_are_nothing(tmp_path):
    write_shard(tmp_path / "shards" / "b.parquet", ROWS[10:])
    write_shard(tmp_path / "shards" / "a.json.gz", ROWS[:10])
    write_shard(tmp_path / "shards" / "c.jsonl", [])
    write_shard(tmp_path / "shards" / "d.jsonl.gz", [])
    write_shard(tmp_path / "shards" / "e.parquet", [])  # without columns
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "shards" / "f.parquet")
    (tmp_path / "shards" / "README.md").write_text("not a shard")
    (tmp_path / "shards" / "book.txt").write_text("beside shards")
    documents = opened(tmp_path, tmp_path / "shards", "languini")
    assert texts(documents) == {str(i): row["text"] for i, row in enumerate(ROWS)}
    assert str(documents.left_out) == "2 that are no shards ('README.md', …), 1 empty ('c.jsonl')"
    write_shard(tmp_path / "shards" / "b.parquet", ROWS[9:])
    assert opened(tmp_path, tmp_path / "shards", "languini").digest != documents.digest


def test_rows_without_text_keep_their_place(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}]
    documents = opened(tmp_path, write_shard(tmp_path / "a.parquet", rows), "languini")
    assert texts(documents) == {"0": "a", "1": "", "2": "", "3": "b"}
    assert str(documents.left_out) == "2 rows without text ('a.parquet, row 2', …)"


def test_rows_are_streamed(tmp_path, monkeypatch):
    taken = []
    nine = lambda shard, column: (taken.append(i) or (f"line {i}", {column: "x"}) for i in range(9))  # noqa: E731
    monkeypatch.setattr(documents_module, "_json_rows", nine)
    shards = [write_shard(tmp_path / name, []) for name in ("a.jsonl", "b.jsonl")]
    rows = iter(Rows(shards, "text"))
    assert [next(rows).name for _ in range(2)] == ["0", "1"] and len(taken) == 2
    assert [document.name for document in rows][-1] == "17"


def test_a_damaged_row_keeps_its_place_and_is_counted_once(tmp_path):
    lines = [
        *(b'{"text": "a"}', b'{"text": "cut', b"", b'{"text": "\xff"}', b'{"text": 3}', b"[1]", b'{"texts": "b"}'),
        *(b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": null}', b'{"text": "c"}'),
    ]
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    documents = opened(tmp_path, shard, "languini")
    for _ in range(2):
        assert texts(documents) == {str(i): {0: "a", 9: "c"}.get(i, "") for i in range(10)}
        damaged = "7 rows that cannot be read ('a.jsonl, line 2', …)"
        assert str(documents.left_out) == f"{damaged}, 1 rows without text ('a.jsonl, line 10')"
    array = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"a", b"\xff", b"b"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "b.parquet")
    documents = opened(tmp_path, tmp_path / "b.parquet", "languini")
    assert texts(documents) == {"0": "a", "1": "", "2": "b"}
    assert str(documents.left_out) == "1 rows that cannot be read ('b.parquet, row 2')"


UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(rows=st.lists(st.none() | UNICODE, min_size=1), ascii_only=st.booleans())
def test_any_text_comes_back_from_any_kind_of_shard(tmp_path, rows, ascii_only):
    table = [{"text": text} for text in rows]
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in table)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    (tmp_path / "b.json").write_text(json.dumps(table, indent=1, ensure_ascii=ascii_only), encoding="utf-8", newline="")
    write_shard(tmp_path / "c.parquet", table)
    for name in ("a.jsonl", "b.json", "c.parquet"):
        documents = Rows([tmp_path / name], "text")
        assert [b"".join(d.open()).decode() for d in documents] == [text or "" for text in rows]
        assert documents.left_out.counts().get("rows without text", 0) == sum(not text for text in rows)


def test_books_may_be_plain_files(tmp_path):
    documents = opened(tmp_path, write_folder(tmp_path / "books", count=4), "languini")
    assert isinstance(documents, TextFiles) and len(documents) == 4


def test_unusable_shards_are_one_sentence_that_names_them(tmp_path):
    for name in ("bad.parquet", "bad.jsonl", "bad.json.gz"):
        (tmp_path / name).write_text("hello\nyou")
    assert "bad.parquet' cannot be read as parquet" in error_of(tmp_path, tmp_path / "bad.parquet", "languini")
    assert "bad.json.gz' cannot be read as json" in error_of(tmp_path, tmp_path / "bad.json.gz", "languini")
    sentence = "bad.jsonl': none of its first 2 rows can be read as text: line 1 is damaged (JSONDecodeError"
    assert sentence in error_of(tmp_path, tmp_path / "bad.jsonl", "languini")
    cut = write_shard(tmp_path / "cut.json.gz", ROWS * 50)
    cut.write_bytes(cut.read_bytes()[:-200])
    assert "cut.json.gz' cannot be read as json (EOFError" in error_of(tmp_path, cut, "languini")
    shard = write_shard(tmp_path / "a.parquet", [{"contents": "x"}])
    assert "a.parquet' has no column 'content'; did you mean 'contents'?" in error_of(tmp_path, shard, "codeparrot")
    shard = write_shard(tmp_path / "a.jsonl", [{"contents": "x"}])
    assert "line 1 has no column 'content'; did you mean 'contents'?" in error_of(tmp_path, shard, "codeparrot")
    rows = Rows([write_shard(tmp_path / "many.jsonl", [{"contents": "x"}] * 5000)], "content")
    with pytest.raises(
        UserError, match="many.jsonl': none of its first 1,000 rows can be read as text: line 1 has no column"
    ):
        list(rows)
    assert rows.left_out.counts() == {"rows that cannot be read": 1000}  # the rest is not waited for
    shard = write_shard(tmp_path / "b.parquet", [{"text": 3}])
    assert "row 1 holds int instead of text in column 'text'" in error_of(tmp_path, shard, "languini")
    assert "no public copy" in error_of(tmp_path, "", "languini")
    folder = write_folder(tmp_path / "plain", count=1)
    assert "holds no shard (.parquet, .jsonl" in error_of(tmp_path, folder, "codeparrot")


def test_offline_hub_says_what_to_put_where(tmp_path):
    message = error_of(tmp_path, "", "codeparrot")  # conftest sets HF_HUB_OFFLINE
    for part in ("huggingface-course/codeparrot-ds-train", "*.json.gz or *.parquet", "config.data.files"):
        assert part in message


def test_hub_that_never_answers_is_given_up(tmp_path, monkeypatch):
    import huggingface_hub

    assert sources._HUB_SECONDS < 10
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.1)
    # as name resolution does, it heeds no timeout
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repository, timeout: time.sleep(5))
    start = time.monotonic()
    assert "is out of reach: the hub does not give" in error_of(tmp_path, "", "codeparrot")
    assert time.monotonic() - start < 4


def test_hub_copy_is_downloaded_once_and_used_without_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repository, *, repo_type, local_dir, allow_patterns):
        calls.append((repository, repo_type))
        write_shard(local_dir / "data" / "train.json.gz", ROWS)
        write_shard(local_dir / "dataset_infos.json", [{"x": 1}])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repository, timeout: None)
    expected = {str(i): row["content"] for i, row in enumerate(ROWS)}
    assert texts(opened(tmp_path, "", "codeparrot")) == expected
    monkeypatch.undo()
    assert texts(opened(tmp_path, "", "codeparrot")) == expected
    assert calls == [("huggingface-course/codeparrot-ds-train", "dataset")]


def test_interrupted_download_does_not_count(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(repository, *, repo_type, local_dir, allow_patterns):
        write_shard(local_dir / "first.json.gz", ROWS)
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repository, timeout: None)
    assert "ConnectionError" in error_of(tmp_path, "", "codeparrot")
    monkeypatch.undo()
    assert "out of reach" in error_of(tmp_path, "", "codeparrot")
