import gzip
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jax_entropy.data import sources
from jax_entropy.data.sources import Rows, TextFiles, open_documents
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
    assert documents.skipped == 3


def test_single_file_and_glob_take_any_suffix(tmp_path):
    (tmp_path / "logs" / "deep").mkdir(parents=True)
    for name in ("a.log", "b.log", "deep/c.log", "d.other"):
        (tmp_path / "logs" / name).write_text(name)
    assert texts(opened(tmp_path, tmp_path / "logs" / "a.log")) == {"a.log": "a.log"}
    assert set(texts(opened(tmp_path, tmp_path / "logs" / "*.log"))) == {"a.log", "b.log"}
    assert set(texts(opened(tmp_path, tmp_path / "logs" / "**" / "*.log"))) == {"a.log", "b.log", "deep/c.log"}


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
    assert "is an empty folder" in error_of(tmp_path, tmp_path / "empty")
    assert "of 2 files 1 are binary (not UTF-8) and 1 are empty" in error_of(tmp_path, tmp_path / "binary")
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
    (tmp_path / "shards" / "README.md").write_text("not a shard")
    documents = opened(tmp_path, tmp_path / "shards", "languini")
    assert texts(documents) == {str(i): row["text"] for i, row in enumerate(ROWS)}
    write_shard(tmp_path / "shards" / "b.parquet", ROWS[9:])
    assert opened(tmp_path, tmp_path / "shards", "languini").digest != documents.digest


def test_rows_without_text_keep_their_place(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}]
    documents = opened(tmp_path, write_shard(tmp_path / "a.parquet", rows), "languini")
    assert texts(documents) == {"0": "a", "1": "", "2": "", "3": "b"}


def test_rows_are_streamed(monkeypatch):
    taken = []
    monkeypatch.setattr(sources, "_texts_of_shard", lambda shard, column: (taken.append(i) or "x" for i in range(9)))
    monkeypatch.setattr(Rows, "__init__", lambda self: self.__dict__.update(shards=["a", "b"], column="text"))
    rows = iter(Rows())
    assert [next(rows).name for _ in range(2)] == ["0", "1"] and len(taken) == 2
    assert [document.name for document in rows][-1] == "17"


def test_books_may_be_plain_files(tmp_path):
    documents = opened(tmp_path, write_folder(tmp_path / "books", count=4), "languini")
    assert isinstance(documents, TextFiles) and len(documents) == 4


def test_unusable_shards_are_one_sentence_that_names_them(tmp_path):
    for name in ("bad.parquet", "bad.jsonl"):
        (tmp_path / name).write_text("hello\nyou")
        assert f"{name} cannot be read as" in error_of(tmp_path, tmp_path / name, "languini")
    cut = write_shard(tmp_path / "cut.json.gz", ROWS * 50)
    cut.write_bytes(cut.read_bytes()[:-200])
    assert "cut.json.gz cannot be read as json" in error_of(tmp_path, cut, "languini")
    shard = write_shard(tmp_path / "a.parquet", [{"contents": "x"}])
    assert "a.parquet has no column 'content'; did you mean 'contents'?" in error_of(tmp_path, shard, "codeparrot")
    shard = write_shard(tmp_path / "b.parquet", [{"text": 3}])
    assert "column 'text' holds int instead of text" in error_of(tmp_path, shard, "languini")
    assert "no public copy" in error_of(tmp_path, "", "languini")
    folder = write_folder(tmp_path / "plain", count=1)
    assert "holds no shard (.parquet, .jsonl" in error_of(tmp_path, folder, "codeparrot")


def test_offline_hub_says_what_to_put_where(tmp_path):
    message = error_of(tmp_path, "", "codeparrot")  # conftest sets HF_HUB_OFFLINE
    for part in ("huggingface-course/codeparrot-ds-train", "*.json.gz or *.parquet", "config.data.files"):
        assert part in message


def test_hub_that_never_answers_is_given_up_within_ten_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "NO_PROXY": "127.0.0.1",
        }
        program = (
            "import sys, time, huggingface_hub, pathlib\n"
            "from jax_entropy.data import sources\n"
            "start = time.monotonic()\n"
            "try:\n    sources._download(sources.CODEPARROT_REPOSITORY, pathlib.Path(sys.argv[1]))\n"
            "except sources.UserError as error:\n    print(time.monotonic() - start, error)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
        )
    seconds, _, message = result.stdout.partition(" ")
    assert float(seconds) < 10 and "out of reach" in message


def test_asking_has_a_limit_that_no_library_can_stretch():
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        sources._within(0.1, lambda: time.sleep(3))
    assert time.monotonic() - start < 2
    with pytest.raises(KeyError):
        sources._within(5, lambda: {}["x"])


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
