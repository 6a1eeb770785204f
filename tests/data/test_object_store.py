"""A source and shards in an object store: a real server that speaks S3, over HTTP."""

import shutil
import tempfile
from pathlib import Path

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from shike_core.config import SubsetConfig
from shike_core.data.manifest import read_subset
from shike_core.errors import DatasetError
from shike_core.stages import build_subset

RULE = SubsetConfig(
    dataset="image_folder", imbalance_factor=0, test_per_class=2, short_side=64, shard_mib=1
)


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of real photographs."""
    files = sorted((Path(__file__).parents[3] / "shared/data/photographs").glob("*.JPEG"))
    if not files:
        pytest.skip("there are no photographs in ../shared")
    root = tmp_path_factory.mktemp("photographs")
    for name, part in (("birds", files[:6]), ("boats", files[100:105])):
        (root / name).mkdir()
        for path in part:
            shutil.copy(path, root / name)
    return root


@pytest.fixture(scope="module")
def bucket(photographs, tmp_path_factory):
    """The same in a bucket, whose server the environment names."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tempfile, "tempdir", None)  # to be looked up anew, not in what others left
        s3fs.S3FileSystem.clear_instance_cache()  # those of other tests, without these credentials
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in photographs.rglob("*.JPEG"):
            client.upload_file(str(path), "images", f"set/{path.relative_to(photographs)}")
        yield client
    server.stop()


def test_a_subset_of_a_bucket_is_that_of_a_folder(photographs, bucket, tmp_path):
    here = build_subset(RULE, photographs, tmp_path / "here", ignore)
    there = build_subset(
        RULE, "s3://images/set", tmp_path / "there", ignore, shards_dir="s3://images/shards"
    )
    assert there["digest"] == here["digest"]
    assert there["sizes"] == {"train": 7, "test": 4}
    kept = [item["Key"] for item in bucket.list_objects_v2(Bucket="images")["Contents"]]
    assert any(key.startswith("shards/") and key.endswith(".parquet") for key in kept)
    one, other = (
        read_subset(tmp_path / place, splits=("train",)).splits["train"].images
        for place in ("here", "there")
    )
    rows = [3, 0, 6]
    assert other.read(rows) == one.read(rows)


def test_a_bucket_that_is_not_there_is_told_in_one_line(bucket, tmp_path):
    with pytest.raises(DatasetError, match=r"s3://elsewhere/set .*cannot be read") as caught:
        build_subset(RULE, "s3://elsewhere/set", tmp_path, ignore)
    assert "\n" not in str(caught.value)


def test_a_bucket_without_credentials_is_told_in_one_line(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()  # those with credentials
    with pytest.raises(DatasetError, match=r"s3://images/set .*cannot be read .*credentials") as no:
        build_subset(RULE, "s3://images/set", tmp_path / "out", ignore)
    assert "\n" not in str(no.value)
