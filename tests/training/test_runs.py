from pathlib import Path

import pytest

from samlite import UsageError
from samlite.training.runs import RECORDS, read_records


@pytest.mark.parametrize("content", [b'{"epoch": 1, "lr"', b"\xff\xfe", b"", b"[]", b'{"epoch": 2}'])
def test_records_that_cannot_be_read_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_bytes(content)
    with pytest.raises(UsageError, match="metrics.jsonl must hold the records of a run"):
        read_records(tmp_path)
