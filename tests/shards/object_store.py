"""What tests do with the S3 server of `s3_server.py`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from pyarrow import fs

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class ObjectStore:
    """The server; every test takes a bucket of its own."""

    def __init__(self, port: int) -> None:
        self._endpoint = f"127.0.0.1:{port}"
        self._numbers = itertools.count()

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

    def new_url(self) -> str:
        """A URL in a bucket that nobody has used."""
        bucket = f"bucket-{next(self._numbers)}"
        self.client.create_dir(bucket)
        return f"s3://{bucket}/sets/one?endpoint_override={self._endpoint}&scheme=http&region=us-east-1"

    def files(self, url: str) -> dict[str, bytes]:
        """Every object under a URL, by its name there."""
        found = self.client.get_file_info(fs.FileSelector(root_of(url), recursive=True, allow_not_found=True))
        return {
            info.path.removeprefix(f"{root_of(url)}/"): bytes(self.client.open_input_file(info.path).read())
            for info in found
            if info.type == fs.FileType.File
        }

    def overwrite(self, url: str, name: str, data: bytes) -> None:
        with self.client.open_output_stream(f"{root_of(url)}/{name}") as stream:
            stream.write(data)


def root_of(url: str) -> str:
    """Bucket and prefix."""
    return url.removeprefix("s3://").split("?")[0]


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
