"""Sources of rows: pipeline/data/sources.py and pipeline/data/registry.py."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from pipeline.core.files import UserError, sha256
from pipeline.data import registry
from pipeline.data.sources import Files, Hub, Registry, read_table

ROWS = [{"text": "a, \"b\"\nc", "label": "007"}, {"text": "é", "label": "NA"}]


def write_csv(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding, newline="")
    return path


def archive(members):
    """A tar.gz of {name: bytes} as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_csv_cells_stay_text(tmp_path):
    path = write_csv(tmp_path / "a.csv", '\ufefftext,label\r\n"a, ""b""\nc",007\r\n\r\né,NA\r\n')
    assert read_table(path) == ROWS


@pytest.mark.parametrize(("line", "reason"), [
    ("[" * 100_000, "is not JSON .nested too deeply"), ('{"text": "q \\ud800"}', "is not JSON .it holds half of a surrogate pair"),
    ('{"text": "a", "text": "b"}', "is not JSON .it has the key 'text' twice"), ('{"o": {"a": 1, "a": 2}}', "is not JSON .it has the key 'a' twice"),
    ('{"n": ' + "9" * 5000 + "}", "is not JSON .Exceeds the limit"),
], ids=["deep", "surrogate", "key", "key inside", "digits"])
def test_a_line_of_json_that_cannot_be_meant(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"a.jsonl line 2 {reason}"):
        read_table(tmp_path / "a.jsonl")


def test_a_byte_order_mark_costs_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert read_table(tmp_path / "a.jsonl") == [{"text": "a"}, {"text": "b"}]


def test_files_without_rows_and_web_pages_are_named(tmp_path):
    for name, text, reason in (("a.csv", "", "a.csv holds no rows"), ("b.csv", "text,label\n", "b.csv holds no rows"),
                               ("c.jsonl", "\n", "c.jsonl holds no rows"),
                               ("d.csv", "\n<!DOCTYPE html>\n<html>", "d.csv is a web page, no table"), ("e.parquet", "<html>", "e.parquet is a web page")):
        write_csv(tmp_path / name, text)
        with pytest.raises(UserError, match=reason):
            Files(str(tmp_path / name)).read(tmp_path)


def test_tabs_are_read_without_quoting(tmp_path):
    path = write_csv(tmp_path / "a.txt", '1\t0.5\tan "open quote\r\n2\t-1\tx')
    rows = [{"id": "1", "mean": "0.5", "text": 'an "open quote'}, {"id": "2", "mean": "-1", "text": "x"}]
    assert read_table(path, ["id", "mean", "text"]) == rows


def test_a_parquet_file_with_damaged_pages_is_refused_in_one_sentence(tmp_path):
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    Dataset.from_list([{"text": "a fine film", "label": number} for number in range(50)]).to_parquet(path)
    data = bytearray(path.read_bytes())
    data[4:24] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.parquet cannot be read as Parquet"):
        read_table(path)


def test_parquet_and_jsonl_keep_types(tmp_path):
    from datasets import Dataset

    rows = [{"n": 1.5, "c": ["a", "b"], "t": None}, {"n": 2.0, "c": [], "t": "x"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_table(tmp_path / "a.parquet") == read_table(tmp_path / "a.jsonl") == rows


def test_a_file_with_a_header_alone_has_no_rows(tmp_path):
    assert read_table(write_csv(tmp_path / "a.csv", "text,label\n")) == [] == read_table(write_csv(tmp_path / "b.csv", ""))


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "text,label\na,b\nc,d,e\n", "a.csv line 3 has 3 cells for 2 columns"),
    ("a.csv", "text,label\na\n", "a.csv line 2 has 1 cells for 2 columns"),
    ("a.csv", 'text,label\n"open,b\n', "a.csv line 2 cannot be read as csv"),
    ("a.csv", "text,text\na,b\n", "two columns of the same name"),
    ("a.jsonl", '{"a": 1}\n{"a": 2\n', "a.jsonl line 2 is not JSON"),
    ("a.jsonl", "[1]\n", "a.jsonl line 1 is not a JSON object"),
    ("a.parquet", "text\n", "a.parquet cannot be read as Parquet"),
    ("a.xlsx", "", r"a.xlsx has the ending '.xlsx'.*\.csv"),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_table(write_csv(tmp_path / name, text))


def test_another_encoding_is_named_or_set(tmp_path):
    path = write_csv(tmp_path / "a.csv", "text\né\n", "latin-1")
    assert read_table(path, encoding="latin-1") == [{"text": "é"}]
    for encoding in ("utf-8", "utf-9"):
        with pytest.raises(UserError, match=f"a.csv is not {encoding}.*task.source.encoding"):
            read_table(path, encoding=encoding)


def test_files_by_split_glob_and_folder(tmp_path):
    for name in ("a-2.csv", "a-1.csv", "test.csv"):
        write_csv(tmp_path / name, f"text\n{name}\n")
    loaded = Files({"train": "a-*.csv", "test": "test.csv"}, folder=str(tmp_path)).read(tmp_path)
    assert loaded.sets == {"train": [{"text": "a-1.csv"}, {"text": "a-2.csv"}], "test": [{"text": "test.csv"}]}
    assert loaded.origin["sha256"][(tmp_path / "test.csv").as_posix()] == sha256(tmp_path / "test.csv")
    assert list(Files(str(tmp_path / "a-*.csv")).read(tmp_path).sets) == ["train"]
    with pytest.raises(UserError, match="b-.*does not exist; fix task.source.files"):
        Files("b-*.csv", folder=str(tmp_path)).read(tmp_path)


def test_hub_reads_a_local_repository(tmp_path):
    repository = tmp_path / "repo"
    (repository / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        (repository / "data" / f"{split}.jsonl").write_text(json.dumps({"q": split, "c": {"text": ["a"]}}) + "\n", encoding="utf-8")
    loaded = Hub(str(repository), splits={"train": "train", "test": "validation"}).read(tmp_path / "work")
    assert loaded.sets == {"train": [{"q": "train", "c": {"text": ["a"]}}], "test": [{"q": "validation", "c": {"text": ["a"]}}]}
    with pytest.raises(UserError, match="split 'tset', cannot be loaded.*fix task.source"):
        Hub(str(repository), splits={"train": "tset"}).read(tmp_path / "work")


def test_hub_without_a_network_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="'a/b' cannot be reached; connect to the network for the first use"):
        Hub("a/b").read(tmp_path)


def test_registry_reads_a_member_of_an_archive_in_a_package(tmp_path):
    inner = archive({"data/a.txt": b"1\tgood\n", "data/b.txt": b"2\tbad\n"})
    (tmp_path / "downloads").mkdir()
    package = tmp_path / "downloads" / "thing-1.0.tar.gz"
    package.write_bytes(archive({"thing-1.0/inner.tar.gz": inner}))
    source = {"package": "thing", "version": "1.0", "kind": "sdist", "archive": "thing-1.0/inner.tar.gz", "header": ["n", "label"]}
    loaded = Registry(**source, sha256=sha256(package), files={"train": "data/a.txt", "other": "data/b.txt"}).read(tmp_path)
    assert loaded.sets == {"train": [{"n": "1", "label": "good"}], "other": [{"n": "2", "label": "bad"}]}
    assert loaded.origin["sha256"] == sha256(package)
    with pytest.raises(UserError, match="no member 'data/c.txt', the nearest is 'data/"):
        Registry(**source, sha256=sha256(package), files={"train": "data/c.txt"}).read(tmp_path)
    with pytest.raises(UserError, match=f"thing-1.0.tar.gz has the sha256 {sha256(package)}, not the pinned 00"):
        Registry(**source, sha256="00", files={"train": "data/a.txt"}).read(tmp_path)
    with pytest.raises(UserError, match="task.source.kind"):
        Registry(**{**source, "kind": "egg"}, sha256="00", files={})


def test_members_of_a_wheel_and_of_what_is_no_archive(tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("a/b.txt", "hello")
    assert registry.member(wheel, "a/b.txt") == b"hello"
    with pytest.raises(UserError, match="a.whl/a/b.txt is not a readable archive"):
        registry.member(wheel, "a/b.txt", "c")


@pytest.mark.parametrize(("stderr", "message"), [
    ("ERROR: no (from versions: none)\nERROR: No matching distribution found for a==1\n", "cannot fetch a==1 .pip: No matching.*connect"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected sha256 ab\n     Got        cd\n", "has the sha256 cd, not the pinned ab"),
])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, stderr, message):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(UserError, match=message):
        registry.fetch("a", "1", "sdist", "ab", tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


@pytest.mark.slow
def test_pip_runs_nothing_of_an_sdist(tmp_path, monkeypatch):
    """Real pip, a local folder as its index: a setup.py that would leave a trace leaves none."""
    trace, index = tmp_path / "trace", tmp_path / "index"
    index.mkdir()
    setup = f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='thing', version='1.0')\n"
    (index / "thing-1.0.tar.gz").write_bytes(archive({
        "thing-1.0/setup.py": setup.encode(), "thing-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
    }))
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    digest = sha256(index / "thing-1.0.tar.gz")
    path = registry.fetch("thing", "1.0", "sdist", digest, tmp_path / "downloads")
    assert sha256(path) == digest and not trace.exists()
    with pytest.raises(UserError, match=f"has the sha256 {digest}, not the pinned {'0' * 64}"):
        registry.fetch("thing", "1.0", "sdist", "0" * 64, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot fetch thing==2.0 .pip: No matching distribution.*connect to the network for the first use"):
        registry.fetch("thing", "2.0", "sdist", digest, tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_importing_the_sources_is_light():
    code = "import sys, pipeline.prepare, pipeline.rationales; sys.exit(bool({'datasets', 'pandas', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("header", [b"GGUF\x03\0\0\0" + (5).to_bytes(8, "little") + (9).to_bytes(8, "little"), b"GGUF" + bytes(range(200, 250)), b"GGUF\x03"])
def test_a_damaged_gguf_file_is_one_sentence(tmp_path, header):
    from pipeline.models.sources import Local

    (tmp_path / "own.gguf").write_bytes(header)
    with pytest.raises(UserError, match=r"own\.gguf cannot be read as a model \(.*\); fetch it again"):
        Local(str(tmp_path / "own.gguf")).load(tmp_path, False, False)


def test_libraries_say_nothing_that_nobody_asked_for():
    """The hub's client, which sets its logger's level when it is imported, after the command began; torch, as Hydra has the root logger tell all."""
    code = ("import logging; from pipeline.core.arguments import quiet; quiet(); logging.basicConfig(level=logging.INFO); import huggingface_hub; "
            "print(min(logging.getLogger('huggingface_hub').level, 10 + logging.getLogger('torch._subclasses.fake_tensor').level))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={k: v for k, v in os.environ.items() if "HF_" not in k})
    assert int(said.stdout) >= 40
