"""Members of tars that say something of others: labels of a shard or of all, and links."""

import io
import json
import tarfile

from tests.data.format.test_tars import levels, png, shard
from undiffuse.data.passed import counts
from undiffuse.data.source import open_raw


def test_a_file_of_labels_is_of_the_pictures_of_its_shard_if_each_has_one(tmp_path):
    """StyleGAN numbers from 0 in each; one file alone may be of all shards."""
    for k in range(2):
        names = ("00000/img00000000.png", "00000/img00000001.png")
        said = json.dumps({"labels": [[name, 2 * k + i] for i, name in enumerate(names)]}).encode()
        shard(
            tmp_path / "each" / f"{k}.tar",
            {name: png(2 * k + i) for i, name in enumerate(names)} | {"dataset.json": said},
        )
        members = {f"00000/{k}{i}.png": png(2 * k + i) for i in range(2)}
        every = json.dumps({"labels": [[f"00000/{a}{b}.png", 2 * a + b] for a in range(2) for b in range(2)]}).encode()
        shard(tmp_path / "all" / f"{k}.tar", members | ({"dataset.json": every} if k else {}))
    for folder in ("each", "all"):
        source = open_raw(tmp_path / folder)
        assert source.labels == (0, 1, 2, 3) and levels(source) == [0, 1, 2, 3] and not source.passed


def test_links_are_the_files_that_they_lead_to(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, to in (
            ("x/a.png", tarfile.REGTYPE, ""),
            ("x/b.png", tarfile.LNKTYPE, "x/a.png"),
            ("x/c.png", tarfile.SYMTYPE, "a.png"),
            ("x/d.png", tarfile.SYMTYPE, "../../e.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, to
            data = png(9) if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = open_raw(tmp_path / "a.tar")
    assert levels(source) == [9, 9, 9] and counts(source.passed) == {"that are links to files elsewhere": 1}
