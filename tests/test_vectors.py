"""Fingerprints beside saved vectors. Some milliseconds."""

import pytest

from serving.vectors import check_fingerprint, fingerprint_file, read_fingerprint, with_fingerprint, write_fingerprint


FINGERPRINT = {"weights": "a" * 64, "code": "b" * 64, "instruction": "größer", "dimensions": 8, "normalized": True}


def test_npy(tmp_path):
    path = tmp_path / "a.b.npy"
    assert read_fingerprint(path) is None
    write_fingerprint(path, FINGERPRINT)
    assert read_fingerprint(path) == FINGERPRINT
    assert [file.name for file in tmp_path.iterdir()] == ["a.b.npy.json"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table, path = pa.table({"text": ["a"]}), tmp_path / "a.parquet"
    pq.write_table(table, path)
    assert read_fingerprint(path) is None
    schema = with_fingerprint(table.schema.with_metadata({b"mine": b"1"}), FINGERPRINT)
    pq.write_table(table.cast(schema), path)
    assert read_fingerprint(path) == FINGERPRINT and pq.read_schema(path).metadata[b"mine"] == b"1"


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_damaged(tmp_path, text):
    fingerprint_file(tmp_path / "a.npy").write_text(text)
    with pytest.raises(ValueError, match="Embed the texts again"):
        read_fingerprint(tmp_path / "a.npy")


def test_check():
    check_fingerprint(dict(FINGERPRINT), FINGERPRINT)
    with pytest.raises(ValueError, match="no fingerprint"):
        check_fingerprint(None, FINGERPRINT)
    with pytest.raises(
        ValueError, match=r"x.npy differs .* in weights, dimensions \(4 there, 8 here\). Use the same model"
    ):
        check_fingerprint({**FINGERPRINT, "weights": "c", "dimensions": 4}, FINGERPRINT, "x.npy")
    with pytest.raises(ValueError, match=r"in instruction \(None there, 'größer' here\). Use the same arguments"):
        check_fingerprint({**FINGERPRINT, "instruction": None}, FINGERPRINT)
    for found in ({**FINGERPRINT, "more": 1}, {name: FINGERPRINT[name] for name in FINGERPRINT if name != "code"}):
        with pytest.raises(ValueError, match="more|code"):
            check_fingerprint(found, FINGERPRINT)
    check_fingerprint({**FINGERPRINT, "code": "c"}, FINGERPRINT, ignore=("code",))
